"""Load on a real server, and a report of what came back: `make load`, or `python -m load_tests.load --help`."""
