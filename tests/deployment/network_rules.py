"""What Kubernetes' network policies allow, for pods by their labels; enough of their meaning for our own policies."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pod:
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "pacos"
    namespace_labels: dict[str, str] = field(default_factory=dict)


def reaches(policies: list[dict[str, Any]], source: Pod, target: Pod, port: int) -> bool:
    """Whether a TCP connection is let out of `source` and into `target`."""
    return _allows(policies, "Egress", source, target, port) and _allows(policies, "Ingress", target, source, port)


def reaches_address(policies: list[dict[str, Any]], source: Pod, address: str, port: int) -> bool:
    return _allows(policies, "Egress", source, address, port)


def _allows(policies: list[dict[str, Any]], direction: str, pod: Pod, other: Pod | str, port: int) -> bool:
    """A pod that no policy chooses is free; policies that choose it add up."""
    chosen = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and _matches(policy["spec"]["podSelector"], pod.labels)
        and direction in policy["spec"]["policyTypes"]
    ]
    rules = [rule for spec in chosen for rule in spec.get(direction.lower(), ())]
    side = "to" if direction == "Egress" else "from"
    return not chosen or any(_rule_allows(rule, side, pod, other, port) for rule in rules)


def _rule_allows(rule: dict[str, Any], side: str, pod: Pod, other: Pod | str, port: int) -> bool:
    ports, peers = rule.get("ports"), rule.get(side)
    is_port = not ports or any(entry["protocol"] == "TCP" and entry["port"] == port for entry in ports)
    return is_port and (not peers or any(_is_peer(peer, pod, other) for peer in peers))


def _is_peer(peer: dict[str, Any], pod: Pod, other: Pod | str) -> bool:
    if "ipBlock" in peer:
        return isinstance(other, str) and _in_block(peer["ipBlock"], other)
    if isinstance(other, str):
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace} | other.namespace_labels
        is_namespace = _matches(peer["namespaceSelector"], labels)
    else:
        is_namespace = other.namespace == pod.namespace
    return is_namespace and _matches(peer.get("podSelector", {}), other.labels)


def _in_block(block: dict[str, Any], address: str) -> bool:
    ip = ipaddress.ip_address(address)
    outside = any(ip in ipaddress.ip_network(network) for network in block.get("except", ()))
    return ip in ipaddress.ip_network(block["cidr"]) and not outside


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, f"not understood here: {selector}"
    return selector.get("matchLabels", {}).items() <= labels.items()
