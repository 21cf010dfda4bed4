"""What `loraplex policy init` writes: every key of a policy, explained."""

EXAMPLE = """\
# Who may call this server, and what each may do. A running server reads this file again when it changes; if it is wrong,
# the last good one stays in force. Check it first: loraplex policy check FILE
version: 1

tenants:
  # Runs the service: publishes, promotes, pins, deletes.
  operations:
    roles: [admin]             # invoke, publish, promote, observe; admin is all of them and pin, unload, delete
    adapters: ["*"]            # names, or patterns such as legal-*; without this line, none
    base: true                 # may use the base model itself
    keys: []                   # below it, what `loraplex keys create` prints

  # An application that only asks.
  acme:
    roles: [invoke]
    adapters: [support, "legal-*"]
    keys: []
    # keys:
    #   - id: k3v9xq0m2a7c     # the public half of the key
    #     sha256: 9f86d0818...  # digest of the secret half
    #     expires: 2027-01-01T00:00:00Z
    #     revoked: false       # true: refuse it from now on
    #     note: acme's backend
    # certificates: ["spiffe://example.org/acme", "CN=acme"]  # a subject alternative name, or a common name, as it is
    limits:                    # of each server; what is left out is not limited
      requests_per_s: 10
      burst: 20                # requests at once before that counts
      tokens_per_min: 60000    # of prompts and answers
      concurrent: 16           # requests at once, waiting ones included
      max_waiting: 32          # requests that may wait for a place
      max_tokens: 1024         # of one answer
      weight: 1                # its share of the engine when others want it too
      max_priority: 0          # highest priority that it may ask for
    # cache_group: acme        # tenants of one group share cached prompt prefixes; by default nobody does

  # Prometheus, `loraplex top`, and routers.
  monitoring:
    roles: [observe]
    adapters: ["*"]
    keys: []

# Whose tokens (JWT, OIDC) are believed.
# issuers:
#   - issuer: https://login.example.com
#     audience: loraplex
#     jwks: https://login.example.com/.well-known/jwks.json   # or a file
#     algorithms: [RS256, ES256]
#     tenant_claim: tenant     # its value is the tenant, or is looked up in `tenants`
#     tenants: {"acme-production": acme}
#     leeway_s: 30             # how far clocks may differ
#     revoked: []              # tokens that count no more, by their claim jti

open:                          # what needs no credentials (health never does)
  reflection: false
  metrics: false

share_prefix_cache: false      # true: a tenant can tell by the time to first token what others have asked lately
"""
