"""Judge the kept answers of a finished run again, and let people label them: no model under test is loaded."""
