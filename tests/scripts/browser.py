"""A reader of pages in a browser."""


class Reader:
    """A reader of the page: opens it, presses keys, and looks at elements."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page, width=1280, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(page.as_uri())

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector):
        """Press the tabulator key until the element has the focus."""
        from selenium.webdriver import Keys

        for _ in range(100):
            if self.driver.execute_script("return document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"the tabulator key does not reach {selector}")

    def names(self):
        return [node.text for node in self.all("tbody .open")]

    def style(self, selector, name):
        return self.one(selector).value_of_css_property(name)

    def width(self):
        return self.driver.execute_script("return document.documentElement.scrollWidth")
