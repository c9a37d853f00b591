"""Metal kernels as C++ for ``metal/metal_stdlib``: attributes become calls, all else stays.

A C++ compiler has no use for ``[[thread_index_in_simdgroup]]`` and the like. They are taken out of
the text, line by line, and decide which value a parameter gets when its kernel is called.
"""

from __future__ import annotations

import re

_ATTRIBUTE = re.compile(r"\s*\[\[.*?\]\]")
_KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(([^{]*)\)\s*\{")
_INSTANCE = re.compile(r'^template \[\[host_name\("(\w+)"\)\]\] +kernel +\w+ +(\w+)(<.*>);$', re.M)
_SHARED = re.compile(r"^(\s+)threadgroup (\w+ +\w+ *(?:\[[^\]]*\])+;)", re.M)
_PARAMETER = re.compile(r"^(.*?)(\w+)\s*(?:\[\[(\w+)(?:\(\d+\))?\]\])?$", re.S)

_VALUES = {
    "threadgroup_position_in_grid": "a.group[0], a.group[1], a.group[2]",
    "thread_index_in_threadgroup": "a.thread_in_group",
    "thread_index_in_simdgroup": "a.thread_in_simd",
    "simdgroup_index_in_threadgroup": "a.simd_in_group",
}

_FIND = """\
const launch::kernel_entry * launch::find(const char * name) {
    for (const auto & entry : entries) {
        if (strcmp(entry.name, name) == 0) {
            return &entry;
        }
    }
    return nullptr;
}
"""


def translate(text: str, name: str) -> str:
    """Return the C++ of a ``.metal`` file, with a table of its kernels at the end."""
    arguments = {kernel: _arguments(found) for kernel, found in _KERNEL.findall(text)}
    entries = [
        (host, kernel + template, arguments[kernel])
        for host, kernel, template in _INSTANCE.findall(text)
    ]
    templates = {kernel for _, kernel, _ in _INSTANCE.findall(text)}
    entries += [(k, k, values) for k, values in arguments.items() if k not in templates]

    body = _SHARED.sub(r"\1static \2", _ATTRIBUTE.sub("", _INSTANCE.sub("", text)))
    return "\n".join(
        [
            "#include <metal_stdlib>",
            '#include "launch.h"',
            f'#line 1 "{name}"',
            body,
            *(
                f"static void run_{host}(const launch::arguments & a) {{ {function}({values}); }}"
                for host, function, values in entries
            ),
            "static const launch::kernel_entry entries[] = {",
            *(f'    {{ "{host}", run_{host} }},' for host, _, _ in entries),
            "};",
            _FIND,
        ]
    )


def _arguments(parameters: str) -> str:
    """Return the C++ values of a kernel's parameters, out of ``a``."""
    values, buffer = [], 0
    for parameter in parameters.split(","):
        found = _PARAMETER.match(parameter.strip())
        assert found, parameter
        kind, attribute = found[1].strip(), found[3]
        if attribute == "threadgroup":
            values.append(f"({kind}) a.shmem")
        elif attribute is not None:
            values.append(f"{kind}{{{_VALUES[attribute]}}}")
        elif kind.endswith("&"):
            values.append(f"*({kind[:-1]} *) a.buffer[{buffer}]")
            buffer += 1
        else:
            values.append(f"({kind}) a.buffer[{buffer}]")
            buffer += 1
    return ", ".join(values)
