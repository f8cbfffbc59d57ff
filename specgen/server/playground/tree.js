// Draws the tree that a step verified: from the last token on the left to the guesses on the right.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 92, HEIGHT = 30, BOX = 78;

export function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";
}

// nodes: [{text, parent, drafters, accepted, confidence}], parents before children. color: drafters -> number.
export function drawTree(place, nodes, color) {
  const children = [[], ...nodes.map(() => [])];
  nodes.forEach((node, at) => children[node.parent + 1].push(at));
  const rows = new Array(nodes.length), depths = new Array(nodes.length);
  let row = 0;
  const lay = (at, depth) => {
    depths[at] = depth;
    rows[at] = row;
    children[at + 1].forEach((child, index) => { if (index) row += 1; lay(child, depth + 1); });
  };
  children[0].forEach((child, index) => { if (index) row += 1; lay(child, 1); });

  const deepest = Math.max(...depths), svg = make("svg", {
    width: (deepest + 1) * WIDTH, height: (row + 1) * HEIGHT + 4, role: "img", "aria-label": describe(nodes),
  });
  const at = (node) => node < 0 ? [0, 0] : [depths[node] * WIDTH, rows[node] * HEIGHT];
  for (const [index, node] of nodes.entries()) {
    const [x, y] = at(node.parent), [u, v] = at(index), half = HEIGHT / 2;
    svg.append(make("path", {
      d: `M${x + BOX} ${y + half} C${x + BOX + 10} ${y + half} ${u - 10} ${v + half} ${u} ${v + half}`,
      class: node.accepted ? "taken" : "",
    }));
  }
  svg.append(box("root", ...at(-1), "", ""));
  for (const [index, node] of nodes.entries()) {
    const classes = `f${color(node.drafters)}${node.accepted ? " taken" : ""}`;
    const about = `${node.drafters.join(", ")}, confidence ${node.confidence}${node.accepted ? ", accepted" : ""}`;
    svg.append(box(visible(node.text), ...at(index), classes, about));
  }
  place.replaceChildren(svg);
}

function describe(nodes) {
  const taken = nodes.filter((node) => node.accepted).map((node) => node.text).join("");
  return `${nodes.length} guesses, accepted: ${taken || "none"}`;
}

function box(text, x, y, classes, about) {
  const group = make("g", { class: classes, transform: `translate(${x + 1} ${y + 3})` });
  const label = make("text", { x: BOX / 2, y: 17, "text-anchor": "middle" });
  label.textContent = text.length > 9 ? `${text.slice(0, 8)}…` : text;
  const title = make("title", {});
  title.textContent = about;
  group.append(title, make("rect", { width: BOX, height: HEIGHT - 6, rx: 5 }), label);
  return group;
}

function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
