import signal


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than half a minute")
    # A shell starts what it puts into the background with ctrl-C ignored, and children inherit that: the tests of ctrl-C would wait in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)
