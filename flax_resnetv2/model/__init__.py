"""What a net is, as pure functions and linen modules; knows no data and no training."""
