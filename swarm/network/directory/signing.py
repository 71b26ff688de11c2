"""Signatures by the key that a PeerID stands for, as libp2p makes PeerIDs from keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2

_IN_THE_NAME = 42  # a public key of at most so many bytes is the PeerID itself, with two bytes before it
_SEED_BYTES = 32
_MAX_RSA_BITS, _RSA_EXPONENT = 4096, 65537


@dataclass(frozen=True)
class SigningKey:
    """A daemon's private key; ``public`` is its public key as libp2p writes it."""

    private: Ed25519PrivateKey | RSAPrivateKey
    public: bytes

    @classmethod
    def read(cls, identity: bytes) -> SigningKey:
        """From what stands in an identity file.

        Raises:
            ValueError: it is no such key.
        """
        found = crypto_pb2.PrivateKey.FromString(identity)
        private: Ed25519PrivateKey | RSAPrivateKey
        if found.key_type == crypto_pb2.Ed25519:
            private = Ed25519PrivateKey.from_private_bytes(found.data[:_SEED_BYTES])
            data = private.public_key().public_bytes_raw()
        else:
            loaded = serialization.load_der_private_key(found.data, password=None)
            if not isinstance(loaded, RSAPrivateKey):
                raise ValueError("the identity is neither an Ed25519 nor an RSA key")
            private = loaded
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            data = private.public_key().public_bytes(serialization.Encoding.DER, form)
        return cls(private, crypto_pb2.PublicKey(key_type=found.key_type, data=data).SerializeToString())

    def sign(self, message: bytes) -> bytes:
        """A signature of ``message``."""
        if isinstance(self.private, Ed25519PrivateKey):
            return self.private.sign(message)
        return self.private.sign(message, PKCS1v15(), hashes.SHA256())


def named_by(peer_id: PeerID, public: bytes) -> bool:
    """Whether a PeerID stands for a public key."""
    if len(public) <= _IN_THE_NAME:
        return peer_id.to_bytes() == bytes([0, len(public)]) + public
    return peer_id.to_bytes() == b"\x12\x20" + hashlib.sha256(public).digest()


def is_signed_by(peer_id: PeerID, public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the peer has signed ``message``. Never raises."""
    try:
        if not named_by(peer_id, public):
            return False
        found = crypto_pb2.PublicKey.FromString(public)
        if found.key_type == crypto_pb2.Ed25519:
            Ed25519PublicKey.from_public_bytes(found.data).verify(signature, message)
            return True
        key = serialization.load_der_public_key(found.data)
        if not isinstance(key, RSAPublicKey) or key.key_size > _MAX_RSA_BITS or key.public_numbers().e != _RSA_EXPONENT:
            return False  # others take very long to check
        key.verify(signature, message, PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError, TypeError):
        return False
    except Exception:  # protobuf's and OpenSSL's errors have no common class
        return False
    return True
