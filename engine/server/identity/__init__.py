"""Who calls, what they may do, how much of it, and what is written down about it.

identity.py      puts it together: a call's credentials in, a principal out; the policy's file followed as it changes
policy.py        the policy file: tenants, credentials, rights, limits
example.py       the one that `loraplex policy init` writes
principal.py     a caller and its rights
rights.py        which role each method needs, and which adapter a message is about
keys.py, tokens.py, certificates.py   the three kinds of credentials
quotas.py        what each tenant has used of its limits
audit.py         the audit log
tls.py, follow.py    certificates, and files that are read again when they change
"""

from engine.server.identity.identity import FORWARDED_KEY, TENANT_KEY, Identity, named_tenant
from engine.server.identity.principal import ANYBODY, Principal, Role, act_as, principal

__all__ = [
    "ANYBODY",
    "FORWARDED_KEY",
    "TENANT_KEY",
    "Identity",
    "Principal",
    "Role",
    "act_as",
    "named_tenant",
    "principal",
]
