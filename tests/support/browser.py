"""The local page in a real browser.

python -m tests.support.browser NET CHROMIUM [DIRECTORY].

Outside the tests that everybody runs, for it needs Chromium and ``pip install
playwright``. Starts the server, takes an example, chooses a file, gives a text in place
of an image, and leaves pictures of the page in DIRECTORY.
"""

import sys
from pathlib import Path
from threading import Thread

from playwright.sync_api import expect, sync_playwright

from flax_resnetv2.inference.serve import make_server

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZES = {"light": (1100, 1500), "dark": (1100, 1500), "phone": (390, 1500)}


def look(browser, address: str, kind: str, directory: Path) -> None:
    """One visit: everything that a person can do, and a picture."""
    width, height = SIZES[kind]
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if kind == "dark" else "light",
    )
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(address)
    expect(page.locator("#name")).not_to_be_empty()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # take an example, by the keyboard alone
    expect(page.locator(".bar").first).to_be_visible(timeout=60_000)
    assert page.locator(".maps img").count() > 16
    page.set_input_files("#file", __file__)
    expect(page.locator("#error")).to_contain_text("is not an image")
    page.set_input_files("#file", str(directory / "example.png"))
    expect(page.locator("#error")).to_be_empty()
    overflow = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not overflow, f"wider than the window: {kind}"
    page.screenshot(path=directory / f"serve-{kind}.png")
    # The refused text is the one request that is answered by an error.
    assert not problems, problems
    page.close()


def main(net: str, chromium: str, directory: str = ".") -> None:
    """Visit the page in every size."""
    server = make_server(net, port=0)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    place = Path(directory)
    (place / "example.png").write_bytes(server.inspector.example(7))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        for kind in SIZES:
            look(browser, address, kind, place)
            print(f"{kind}: {place / f'serve-{kind}.png'}")
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
