"""The peer: TRL's trainers and transformers' `generate`, tuned through their API."""
