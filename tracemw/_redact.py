"""Which keys name a secret. Published by `tracemw.capture`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from json.encoder import encode_basestring
from typing import Final

MASK: Final = "[REDACTED]"

DEFAULT_REDACT: Final[tuple[str, ...]] = (
    "password", "passwords", "passwd", "pwd", "passphrase", "passcode", "db_password", "user_password",
    "secret", "secrets", "client_secret", "credential", "credentials", "jwt", "bearer",
    "token", "access_token", "refresh_token", "auth_token", "api_token", "id_token", "csrf_token",
    "access_tokens", "refresh_tokens", "auth_tokens", "api_tokens",
    "api_key", "api_keys", "access_key", "secret_key", "private_key", "signing_key", "encryption_key",
    "account_key", "master_key", "shared_key", "subscription_key", "ssh_key", "session_key",
    "authorization", "basic_auth", "http_auth", "auth_header", "=auth",
    "cookie", "cookies", "csrf", "xsrf", "connection_string",
    "=sig", "=signature", "amz_signature", "goog_signature",
    "otp", "totp", "=pin", "cvv", "cvc", "ssn", "card_number", "credit_card",
)  # fmt: skip
"""Key names that are masked unless the setting `redact` says otherwise; `Redactor` has the rules.

Names that contain another one (`access_token`) are for keys written without any break: `accesstoken`.
"""

# Right after a name these words say that the key measures or describes the secret (token_count,
# password_length), or that it is what a language model works on (token_ids, token_logprobs).
_DESCRIBES = frozenset(
    "age budget count counts expiration expires expiry ids len length limit limits logprob logprobs"
    " size ttl type usage".split()
)
# Names under which a number is a count rather than a secret.
_COUNTED = frozenset({"token"})  # max_tokens and its kin are other words and never match

_WORD_EDGES = re.compile(
    r"[\W_]+|(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])"
)
_BETWEEN_WORDS = re.compile(r"[\W_]+")
_LONGEST_KEY = 128
_MOST_WORDS = 16
_CACHED_KEYS = 2048
_NUMBERS = (int, float)


def _words(key: str) -> list[str]:
    """The words of a key in lower case: `setCookie2`, `set-cookie_2` and `SET_COOKIE2` have the same ones."""
    words = [word.casefold() for word in _WORD_EDGES.split(key) if word]
    return words if len(words) <= 2 * _MOST_WORDS else words[:_MOST_WORDS] + words[-_MOST_WORDS:]


class Redactor:
    """Decides which values are masked, by the name of the key that they stand under.

    A key is split into words at anything that is no letter or digit, at camelCase humps and between letters
    and digits. It names a secret where a run of its words, joined, is one of the names, joined: `api_key`
    matches `apiKey`, `X-API-Key`, `apikey` and `MY_API_KEY_2`, never `keyboard`. So `token` matches
    `access_token` but neither `max_tokens` nor `tokenizer`. A name that begins with `=` matches only keys
    that are nothing else. The match does not count where the word after it says that the key measures or
    describes the secret (`token_count`, `password_length`, `token_type`).

    Under such a key everything is replaced by `[REDACTED]`, whole objects and lists too, except None,
    booleans, and numbers; a number is masked only where the key ends with the name and the name is not
    `token` (`password: 1234` is masked, `secret_version: 3` and `token: 17` stay).

    Args:
        names: The key names; an empty sequence masks nothing.

    Raises:
        ValueError: If a name has no letter or digit.
    """

    __slots__ = ("names", "prefixes", "_joined", "_whole", "_run", "_levels")

    def __init__(self, names: Iterable[str] = DEFAULT_REDACT) -> None:
        self.names = tuple(names)
        self._joined: set[str] = set()
        self._whole: set[str] = set()
        self._run = 3  # names of one word are found in keys that split it: passWord, pass_word
        for name in self.names:
            words = _words(name)
            if not words:
                raise ValueError(f"{name!r} names no key: write words such as 'password' or 'api_key'.")
            (self._whole if name.startswith("=") else self._joined).add("".join(words))
            self._run = max(self._run, len(words))
        self._levels: dict[str, int] = {}
        # Known harmless keys with their JSON text: one dictionary look-up per key is what a capture pays.
        self.prefixes: dict[str, str] = {}

    def masks(self, key: str) -> bool:
        """True where a text under this key is masked."""
        return self.level(key) > 0

    def level(self, key: str) -> int:
        """How much is masked under a key: 0 nothing, 1 all but numbers, 2 numbers too."""
        level = self._levels.get(key)
        if level is None:
            level = self._judge(key)
            if len(key) <= _LONGEST_KEY:
                if len(self._levels) >= _CACHED_KEYS:  # callers choose the keys: no endless growth
                    self._levels.clear()
                self._levels[key] = level
        return level

    def value(self, key: str, value: object) -> object:
        """The value itself, or the mask where it must not be seen under this key."""
        level = self.level(key)
        if not level or value is None or value is True or value is False:
            return value
        return value if level == 1 and type(value) in _NUMBERS else MASK

    def prefix(self, key: str) -> str:
        """The JSON text of a harmless key with its colon, remembered for the next time."""
        text = f"{quote(key)}: "
        if len(key) <= _LONGEST_KEY and not self.level(key):
            if len(self.prefixes) >= _CACHED_KEYS:
                self.prefixes.clear()
            self.prefixes[key] = text
        return text

    def _judge(self, key: str) -> int:
        if len(key) > _LONGEST_KEY:  # a key is judged by its two ends: what is between costs time
            key = f"{key[: _LONGEST_KEY // 2]} {key[-_LONGEST_KEY // 2 :]}"
        joined = _BETWEEN_WORDS.sub("", key).casefold()
        if joined in self._whole:
            return 2
        return self._compare(_words(key)) if any(name in joined for name in self._joined) else 0

    def _compare(self, words: list[str]) -> int:
        level = 0
        for start in range(len(words)):
            for end in range(start + 1, min(start + self._run, len(words)) + 1):
                name = "".join(words[start:end])
                if name in self._joined:
                    if end == len(words) and name not in _COUNTED:
                        return 2
                    if end == len(words) or words[end] not in _DESCRIBES:
                        level = 1
        return level


DEFAULT_REDACTOR: Final = Redactor()


def quote(text: str) -> str:
    """A JSON string. What UTF-8 cannot hold (lone surrogates) is written out as `\\ud800`, visibly."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return encode_basestring(text)
