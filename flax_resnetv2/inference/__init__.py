"""A trained net in use: predictions, exported files and a local web page."""
