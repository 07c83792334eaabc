"""A tree as the text of a drawing: Graphviz DOT and Mermaid. Neither program is needed here."""

from __future__ import annotations

from dendrite_lab.text_tree import escape
from dendrite_lab.trees.model import TreeData, TreeNode, lines_of

# what ends a label, a tag or an entity in Mermaid; its own escapes are #name;
_MERMAID = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;"}


def dot(tree: TreeData, width: int = 40) -> str:
    """A Graphviz digraph: a box a node, the path to the best drawn bold, pruned nodes dashed.

    Args:
        tree: what to draw.
        width: characters of text in a box at most.

    Example:
        >>> print(dot(TreeData([TreeNode(0, text="Hi")], "branches")))
        digraph tree {
          node [shape=box, fontname="monospace"];
          n0 [label="0: Hi"];
        }
    """
    lines = ["digraph tree {", '  node [shape=box, fontname="monospace"];']
    for node in tree.nodes:
        label = "\\n".join(_dot_text(line) for line in _label(node, width))
        lines.append(f'  n{node.id} [label="{label}"{_dot_style(node)}];')
    for parent, child in lines_of(tree):
        bold = " [penwidth=2]" if child.best else ""
        lines.append(f"  n{parent.id} -> n{child.id}{bold};")
    return "\n".join([*lines, "}"])


def mermaid(tree: TreeData, width: int = 40) -> str:
    """A Mermaid flowchart; the path to the best has the class `best`, pruned nodes `pruned`.

    Args:
        tree: what to draw.
        width: characters of text in a box at most.

    Example:
        >>> print(mermaid(TreeData([TreeNode(0, text="Hi")], "branches")))
        flowchart TD
          n0["0: Hi"]
    """
    lines = ["flowchart TD"]
    for node in tree.nodes:
        label = "<br/>".join(_mermaid_text(line) for line in _label(node, width))
        lines.append(f'  n{node.id}["{label}"]')
    lines += [
        f"  n{parent.id} {'==>' if child.best else '-->'} n{child.id}"
        for parent, child in lines_of(tree)
    ]
    for name, style in (("best", "stroke-width:3px"), ("pruned", "stroke-dasharray:4")):
        members = [node for node in tree.nodes if _class_of(node) == name]
        if members:
            lines.append(f"  classDef {name} {style}")
            lines.append(f"  class {','.join(f'n{node.id}' for node in members)} {name}")
    return "\n".join(lines)


def outline(tree: TreeData, width: int = 60) -> str:
    """A line a node, indented below its parent; `*` marks the path to the best.

    Args:
        tree: what to show.
        width: characters of text in a line at most.

    Example:
        >>> print(outline(TreeData([TreeNode(0, text="Hi"), TreeNode(1, 0, text="!")], "")))
        0: Hi
          1: !
    """
    depths: list[int] = []
    below: dict[int, list[TreeNode]] = {}
    for node in tree.nodes:
        depths.append(depths[node.parent] + 1 if node.parent >= 0 else 0)
        below.setdefault(node.parent, []).append(node)
    lines: list[str] = []
    marked = any(node.best for node in tree.nodes)
    stack = below.get(-1, [])[::-1]
    while stack:
        node = stack.pop()
        mark = ("*" if node.best else " ") if marked else ""
        text = "  ".join(escape(line) for line in _label(node, width))
        lines.append("  " * depths[node.id] + mark + text)
        stack += below.get(node.id, [])[::-1]
    return "\n".join(lines)


def _class_of(node: TreeNode) -> str:
    return "best" if node.best else "pruned" if node.status == "pruned" else ""


def _dot_style(node: TreeNode) -> str:
    return {"best": ", penwidth=2", "pruned": ", style=dashed"}.get(_class_of(node), "")


def _label(node: TreeNode, width: int) -> list[str]:
    """Lines of a box: id and text, then what is known of values."""
    text = node.text or (f"({len(node.token_ids)} tokens)" if node.token_ids else "")
    text = text if len(text) <= width else text[: max(1, width - 3)] + "..."
    name = f"{node.id} {node.label}".rstrip()
    lines = [f"{name}: {text}"]
    values = []
    if node.visits:
        values.append(f"N={node.visits}")
    if node.value is not None:
        values.append(f"Q={node.value:.3f}")
    if node.score is not None:
        values.append(f"score={node.score:.3f}")
    if node.finish_reason:
        values.append(node.finish_reason)
    return [*lines, " ".join(values)] if values else lines


def _dot_text(line: str) -> str:
    return "".join('\\"' if c == '"' else escape(c).replace("\\", "\\\\") for c in line)


def _mermaid_text(line: str) -> str:
    return "".join(_MERMAID.get(c) or escape(c) for c in line)
