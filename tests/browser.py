"""A headless Chromium, driven by its DevTools protocol over two pipes."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
"""The path of a browser, if one is installed."""


class Browser:
    """One page of a browser."""

    def __init__(self, commands, answers):
        self._commands = commands
        self._answers = answers
        self._count = 0
        self._session = None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Call a method of the protocol, and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        """Return the next message; events are kept, too."""
        text = b""
        while not text.endswith(b"\0"):
            byte = self._answers.read(1)
            assert byte, "the browser has ended"
            text += byte
        message = json.loads(text[:-1])
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page, width, is_dark):
        """Load a page from a file."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, script):
        """Return the value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        codes = {"ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            code = codes[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)


@contextmanager
def browser(folder):
    """Start a browser with its files in a folder; end it with the block."""
    assert CHROMIUM is not None
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    options = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe"
    script = f'exec "$0" {options} --user-data-dir="$1" 3<&{commands} 4>&{answers} 2>&-'
    process = subprocess.Popen(
        ["bash", "-c", script, CHROMIUM, str(folder)], pass_fds=(commands, answers)
    )
    os.close(commands)
    os.close(answers)
    try:
        with os.fdopen(from_browser, "rb") as stream:
            yield Browser(to_browser, stream)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser)
