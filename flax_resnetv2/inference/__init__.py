"""A trained net in use: predictions, exports and the local page."""
