"""What takes more than a second beside its faster relatives is `slow`: run with -m slow."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: seconds of one core")
