from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from training import resolve
from training.launch import InputError
from training.resolve import ImageFormat, resolve_encoder, resolve_images, resolve_inputs

NOTHING = ImageFormat(None, None, None, None, None)
COLOUR = ImageFormat(3, None, None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
STATISTICS = ImageFormat(2, [0.0, 9.0], -1.0, [0.1, 0.2], [0.3, 0.4])
SIZES = {name: dict(patch_size=16, embed_dim=64 * n, depth=12, num_heads=n) for name, n in (("tiny", 3), ("base", 12))}


def of_weights(channels, value_range=None):
    """Return the format of weights whose mean is 0.5 and whose standard deviation is 0.25."""
    return ImageFormat(channels, value_range, None, [0.5] * channels, [0.25] * channels)


def images(known=STATISTICS, weights=None, adapt_channels=False, **flags):
    options = dict(known=known, trained=weights, adapt_channels=adapt_channels)
    return resolve_images(NOTHING._replace(**flags), **options)


def test_data_fill_the_flags_that_were_left_out():
    assert images() == STATISTICS and images(known=None) == images(input_channels=3) == COLOUR
    assert images(known=None, input_channels=2) == ImageFormat(2, None, None, [0.5, 0.5], [0.5, 0.5])
    assert images(nodata=7.0, std=[1.0, 1.0]) == STATISTICS._replace(nodata=7.0, std=[1.0, 1.0])
    assert images(nodata=0.0).nodata == 0.0 and images(value_range=[0, 9]) == STATISTICS


def test_weights_give_mean_and_standard_deviation():
    assert images(weights=of_weights(2)) == of_weights(2)._replace(value_range=[0.0, 9.0], nodata=-1.0)
    assert images(None, of_weights(2)) == of_weights(2) and images(None, of_weights(5)) == of_weights(5)
    assert images(None, of_weights(2, [0.0, 1.0])) == of_weights(2, [0.0, 1.0])
    eight_bits = STATISTICS._replace(value_range=None)
    assert images(eight_bits, of_weights(2, [0.0, 1.0])) == of_weights(2)._replace(nodata=-1.0)
    assert images(weights=of_weights(3)) == STATISTICS  # weights for another number of channels are an error later
    assert images(None, of_weights(1), adapt_channels=True) == COLOUR


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(value_range=[-9, 9]), "-9 to 9 is not the range of the known mean and standard deviation, 0 to 9; give"),
        (dict(weights=of_weights(2, [0.0, 1.0])), "0 to 9 is not the range of the known mean and .*, 0 to 1"),
        (dict(mean=[0.5]), "--mean has 1 values for 2 channels; give one per channel"),
    ],
)
def test_images_that_contradict_each_other(options, expected):
    with pytest.raises(InputError, match=expected):
        images(**options)
    both = dict(mean=[0.0, 1.0], std=[2.0, 3.0])
    assert images(**{**options, **both})[3:] == ([0.0, 1.0], [2.0, 3.0])


def test_a_format_is_read_from_flags_and_from_statistics():
    assert ImageFormat.from_dict({}) is ImageFormat.from_dict(None) is None
    assert ImageFormat.from_dict(dict(STATISTICS._asdict(), seed=3)) == STATISTICS
    statistics = dict(channels=2, mean=[0.1, 0.2], std=[0.3, 0.4], count=9)
    assert ImageFormat.from_dict(statistics) == STATISTICS._replace(value_range=None, nodata=None)


def flags(**given):
    names = [*resolve.ENCODER_FLAGS.values(), "model", "img_size", "adapt_channels"]
    return {**dict.fromkeys(names), **NOTHING._asdict(), **given}


def test_inputs_follow_from_the_weights_the_run_to_resume_or_a_named_size():
    def inputs(weights=None, previous=None, **given):
        options = dict(previous=previous or {}, weights=weights)
        image_format = resolve_inputs(flags(**given), statistics=None, **options)
        return image_format, resolve_encoder(flags(**given), SIZES, **options)

    tiny, base = (dict(SIZES[name], mlp_ratio=4.0, num_cls_tokens=1) for name in ("tiny", "base"))
    stored = SimpleNamespace(mean=[0.5], std=[0.25], value_range=None)
    weights = SimpleNamespace(sizes=dict(tiny, in_channels=1), stored=stored, grid=(2, 3))
    assert inputs() == (COLOUR, dict(base, img_size=(224, 224)))
    assert inputs(weights) == (of_weights(1), dict(tiny, img_size=(32, 48)))
    assert inputs(weights, model="base", img_size=[64, 64])[1] == dict(base, img_size=(64, 64))
    assert inputs(weights, patch_size=8)[1]["img_size"] == (16, 24)
    weights.sizes["num_cls_tokens"] = 8
    assert inputs(weights, model="base")[1]["num_cls_tokens"] == 8  # named sizes do not set this number
    assert inputs(weights, num_cls_tokens=2)[1]["num_cls_tokens"] == 2  # an error later
    previous = dict(resolve.encoder_flags(tiny), img_size=[48, 48], **STATISTICS._asdict())
    assert inputs(previous=previous) == (STATISTICS, dict(tiny, img_size=(48, 48)))


def test_errors_of_the_encoder_are_told_together():
    weights = SimpleNamespace(sizes=dict(SIZES["tiny"], num_heads=None), grid=None)
    with pytest.raises(InputError, match="give --encoder_num_heads"):
        resolve_encoder(flags(), SIZES, previous={}, weights=weights)
    with pytest.raises(InputError) as error:
        values = flags(encoder_embed_dim=30, encoder_num_heads=7, img_size=[5, 32])
        resolve_encoder(values, SIZES, previous={})
    assert [line.partition(";")[0] for line in str(error.value).splitlines()] == [
        "--encoder_embed_dim 30 is not divisible by --encoder_num_heads 7",
        "--encoder_embed_dim 30 is not divisible by 4, as its positions require",
        "--img_size 5 32 is too small",
        "--img_size 5 32 is not divisible by --patch_size 16",
    ]


@pytest.mark.parametrize(
    "given, expected",
    [
        (dict(), None),
        (dict(model="tiny", patch_size=16, input_channels=1), None),
        (dict(input_channels=3, adapt_channels=True), None),
        (dict(model="base"), "--model base: encoder_embed_dim 768 is not the trained model's 192; leave it out"),
        (dict(num_cls_tokens=2), "--num_cls_tokens 2 is not the trained model's 1; leave it out"),
        (dict(encoder_depth=4), "--encoder_depth 4 is not the trained model's 12; leave it out"),
        (dict(input_channels=3), "--input_channels 3 does not fit the trained model, of 1; leave it out, or give"),
    ],
)
def test_flags_must_fit_a_trained_model(given, expected):
    encoder = SimpleNamespace(**SIZES["tiny"], mlp_ratio=4.0, num_cls_tokens=1, in_channels=1)
    with pytest.raises(InputError, match=expected) if expected else nullcontext():
        resolve.check_trained(flags(**given), SIZES, encoder)


def test_values_that_the_images_do_not_allow():
    for channels in (None, [0], [3, 1, 0]):
        assert not resolve.check_preview(channels, 4)
    for channels in ([0, 1], [0, 1, 4]):
        assert "cannot be shown; expected one or three of 0 to 3" in resolve.check_preview(channels, 4)[0]
    cases = ((9, COLOUR), (9, STATISTICS), (0, STATISTICS))
    assert [resolve.resolve_augmentation(magnitude, 9, images) for magnitude, images in cases] == [9, 0, 0]
    with pytest.raises(InputError, match="--random_aug_magnitude 5 is for 8-bit images in colour or grey; give 0"):
        resolve.resolve_augmentation(5, 9, STATISTICS)
