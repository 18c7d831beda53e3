"""Tests of class files: files of many programs are read correctly, or refused with the line that is wrong."""

import json

import pytest

from data.classes import read_classes

TWO = ["sky", "light pole"]
COLOURS = [[64, 128, 64], [0, 0, 192]]


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    names, colours, errors = read_classes(path, **options)
    return names, None if colours is None else colours.tolist(), errors


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_texts_of_other_programs(tmp_path, encoding, newline, end):
    for lines in (TWO, ["1\tsky", "2\tlight pole "], ["id,name", "1,sky", '2,"light pole"']):
        content = (newline.join(lines) + end).encode(encoding)
        assert read(tmp_path, "classes.txt", content) == (TWO, None, [])


@pytest.mark.parametrize(
    "text",
    [
        *("1 sky\n2 light pole", "1: sky\n2: light pole", "1. sky\n2. light pole", "1) sky\n2) light pole"),
        *("1,sky\n2,light pole", "sky,1\nlight pole,2", '"sky"\n"light pole"', "# a comment\nsky\nlight pole"),
        *("name\nsky\nlight pole", "Class Name\nsky\nlight pole", "name,id\nlight pole,2\nsky,1"),
        *("ID;Label\n1;sky\n2;light pole", "id,name\r\r\n1,sky\r\r\n2,light pole\r\r\n"),
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t7\t8\tsky\n2\t0.2\t7\t8\tlight pole",
    ],
)  # fmt: skip
def test_names_with_numbers_headers_and_columns(tmp_path, text):
    assert read(tmp_path, "classes.csv", text) == (TWO, None, [])


@pytest.mark.parametrize(
    "text",
    [
        *("64 128 64\tsky\n0 0 192\tlight pole", "sky 64 128 64\nlight pole 0 0 192"),
        "sky,64,128,64\nlight pole,0,0,192",
        *("1 64 128 64 sky\n2 0 0 192 light pole", "1,sky,64,128,64\n2,light pole,0,0,192"),
        "# label:color_rgb:parts:actions\nsky:64,128,64::\nlight pole:0,0,192::\n",
        *("name,r,g,b\nsky,64,128,64\nlight pole,0,0,192", "class;red;green;blue\nsky;64;128;64\nlight pole;0;0;192"),
        'name,rgb\nsky,"(64, 128, 64)"\nlight pole,"(0, 0, 192)"',
    ],
)  # fmt: skip
def test_names_with_colours(tmp_path, text):
    assert read(tmp_path, "class_dict.csv", text) == (TWO, COLOURS, [])


@pytest.mark.parametrize(
    "content, colours",
    [
        (TWO, None),
        ({"1": "sky", "2": "light pole"}, None),
        ({"light pole": 2, "sky": 1}, None),
        ({"id2label": {"1": "sky", "2": "light pole"}, "label2id": {"sky": 1, "light pole": 2}}, None),
        ({"images": [], "categories": [{"id": 2, "name": "light pole"}, {"id": 1, "name": "sky"}]}, None),
        ([{"name": "sky", "color": COLOURS[0]}, {"name": "light pole", "color": COLOURS[1]}], COLOURS),
    ],
)
def test_json(tmp_path, content, colours):
    assert read(tmp_path, "classes.json", json.dumps(content)) == (TWO, colours, [])


def test_numbers_must_count_from_the_first_label(tmp_path):
    for name, text in (("a.txt", "0 sky\n1 light pole"), ("a.json", '{"0": "sky", "1": "light pole"}')):
        assert read(tmp_path, name, text, first_label=0) == (TWO, None, [])
        names, _, (error,) = read(tmp_path, name, text)
        assert not names and "sky'" in error and "--mask_offset 0" in error
    assert "has the line '1 sky'" in read(tmp_path, "a.txt", "1 sky\n2 light pole", first_label=0)[2][0]
    many = {str(number): f"c{number}" for number in sorted(range(1, 13), key=str)}  # 1, 10, 11, 12, 2, ...
    assert read(tmp_path, "a.json", json.dumps(many))[0] == [f"c{number}" for number in range(1, 13)]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.csv", "id,name\n1,building, edifice\n2,sky", "the line '1,building, edifice' of 3 columns"),
        ("a.csv", "name,r,g,b\nsky,1,2,300\nroad,3,4,5", "the line 'sky,1,2,300', whose colour is not"),
        ("a.csv", "name,r,g,b\nsky,1,2,3\nroad,1,2,3", "names the colours of classes twice"),
        ("a.csv", "id,name\n1,\n2,road", "the line '1,' without a name"),
        ("a.csv", "id,name\n1.5,sky\n2,road", "with the number '1.5'"),
        ("a.csv", "name,id,trainId\nunlabeled,0,255\nlicense plate,-1,-1", "the line 'license plate,-1,-1'"),
        ("a.txt", "64 128 64 sky\nroad", "the line 'road'; expected a colour and a name"),
        ("a.txt", "1 sky\n1 road", "the line '1 road'"),
        ("a.txt", "id name\n1 sky\n2 road", "begins with 'id name', which may be a header or a class"),
        ("a.txt", "class, type\nsky\nroad", "begins with 'class, type', which may be a header or a class"),
        ("a.txt", "# names\nsky\n#2 pencil\nroad", "the line '#2 pencil' below the first class; put a name in quotes"),
        ("a.csv", "name,color\nsky,#408040\nroad,#0000C0", "the line 'sky,#408040', whose colour is not"),
        ("a.json", '{"sky": [64, 128, 64], "road": [0, 0, 192]}', "the line 'sky: [64, 128, 64]' with the number"),
        ("a.txt", "\nsky\nroad", "an empty line"),
        ("a.txt", b"caf\xe9\nsky", "cannot be read"),
        ("a.xlsx", b"PK\x03\x04\xff\xfe", "cannot be read"),
        ("a.json", '["sky", ', "cannot be read"),
        ("a.json", "[1, 2]", "the line '1' without a name"),
        ("a.json", "3", "expected a list of names"),
    ],
)
def test_other_files_are_refused_with_the_line(tmp_path, name, text, words):
    _, _, (error,) = read(tmp_path, name, text)
    assert words in error and name in error


def test_names_like_comments_and_headers_are_read_in_quotes(tmp_path):
    names = ["class, type", "#2 pencil", "sky"]
    assert read(tmp_path, "a.txt", '"class, type"\n"#2 pencil"\nsky') == (names, None, [])


def test_lists_that_come_with_ade20k(real_images):
    for name in ("objectInfo150.txt", "objectInfo150.csv"):
        names, colours, errors = read_classes(real_images / "ade20k_sample" / name)
        assert (len(names), names[0], names[-1], colours, errors) == (150, "wall", "flag", None, [])
