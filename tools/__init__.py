"""The command line: click commands and rich views, the only place that prints or asks."""
