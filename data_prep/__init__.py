"""One-time conversion of data sets to FFCV's .beton; see ``python -m data_prep --help``."""
