"""Judge the stored answers of a finished run again, and calibrate judges on human labels; no model under test."""
