"""What can go wrong between parties. Every message names the party, the thing and the cure."""


class FederationError(RuntimeError):
    """Base of everything that goes wrong between parties; raised on every party that can still be reached."""


class MismatchError(FederationError):
    """The parties disagree about something they must share: parameters, base model, configuration, round."""


class PartyLostError(FederationError):
    """A party left, died, or did not arrive in time."""
