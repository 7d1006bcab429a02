"""The marker of tests that execute scripts, until pyproject.toml names it."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: executes notebooks or scripts end to end")
