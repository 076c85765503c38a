"""Items asked until decided: what errors it makes, and what it saves, in studies of known truth."""
