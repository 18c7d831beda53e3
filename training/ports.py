"""Find a port that a page can be served at."""

import errno
import socket


def free_port(host: str, port: int) -> tuple[int, list[str]]:
    """Return the first free port of the 100 from `port` on, at an IPv4 or IPv6 address or name; and error messages."""
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        return port, [f"--host {host} is not an address ({reason}); expected one of this machine, such as 127.0.0.1"]
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((place[0], candidate, *place[2:]))
                return candidate, []
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    text = f"--host {host} --port {candidate} cannot be used ({error.strerror})"
                    return port, [f"{text}; give another --host or --port"]
    return port, [f"no port from {port} to {candidate} is free; give another --port"]
