"""No attack: the forbidden prompt unchanged."""

from leeway.attacks.attack import Wrapper

attack = Wrapper(name="none", version=1, origin="control condition", template="{prompt}")
