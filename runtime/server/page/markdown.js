// Markdown to elements. What a model writes is only ever set as text: no markup of its own, no
// images, and links to http and https alone. What is not understood stays as it was written.

const MOST_INLINE = 20_000; // characters of a paragraph: the patterns below are quadratic at worst
const DEEPEST = 8; // of quotes and lists in each other

const INLINE = new RegExp(
  [
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!|~<>])/,
    /(?<ticks>`+)(?<code>[^]*?[^`])\k<ticks>(?!`)/,
    /\[(?<label>[^\][]+)\]\((?<href>https?:\/\/[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)(?:\s+"[^"]*")?\)/,
    /(?<bare>https?:\/\/[^\s<>()\[\]"'*`]*[^\s<>()\[\]"'*`.,;:!?])/,
    /\*\*(?<bold>(?!\s)[^]+?)\*\*(?!\*)/,
    /(?<!\w)__(?<bold2>(?!\s)[^]+?)__(?!\w)/,
    /\*(?<italic>(?![\s*])[^*]*[^\s*])\*(?!\*)/,
    /(?<!\w)_(?<italic2>(?![\s_])[^_]*[^\s_])_(?!\w)/,
    /~~(?<gone>(?!\s)[^]+?)~~/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "g",
);

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(?=\S)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

export function make(name, ...children) {
  const element = document.createElement(name);
  element.append(...children);
  return element;
}

function link(href, ...children) {
  const element = make("a", ...children);
  const url = URL.canParse(href) ? new URL(href) : null;
  if (url?.protocol !== "http:" && url?.protocol !== "https:") return make("span", ...children);
  element.href = url.href;
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  return element;
}

function inline(text) {
  if (text.length > MOST_INLINE) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const found = match.groups;
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const bold = found.bold ?? found.bold2;
    const italic = found.italic ?? found.italic2;
    if (found.escaped) nodes.push(found.escaped);
    else if (found.code !== undefined) nodes.push(make("code", found.code.replace(/^ (.*) $/s, "$1")));
    else if (found.href) nodes.push(link(found.href, ...inline(found.label)));
    else if (found.bare) nodes.push(link(found.bare, found.bare));
    else if (bold) nodes.push(make("strong", ...inline(bold)));
    else if (italic) nodes.push(make("em", ...inline(italic)));
    else nodes.push(make("del", ...inline(found.gone)));
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

const cells = (line) =>
  line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

function table(lines) {
  const row = (name, line) => make("tr", ...cells(line).map((cell) => make(name, ...inline(cell))));
  const body = make("tbody", ...lines.slice(2).map((line) => row("td", line)));
  const whole = make("div", make("table", make("thead", row("th", lines[0])), body));
  whole.className = "wide";
  return whole;
}

function code(lines, language) {
  const button = make("button", "Copy");
  const text = lines.join("\n");
  button.type = "button";
  button.dataset.copy = text;
  const head = make("figcaption", make("span", language || "code"), button);
  return make("figure", head, make("pre", make("code", text)));
}

/** The lines of a list from `at` on, and where it ends. */
function list(lines, at, depth) {
  const [, indent, bullet, first] = ITEM.exec(lines[at]);
  const element = make(bullet ? "ul" : "ol");
  if (first) element.start = Number(first);
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length > indent.length + 3 || Boolean(match[2]) !== Boolean(bullet)) break;
    const inner = [lines[at++].slice(match[0].length)];
    const isInside = (line) => /^\s+/.exec(line)?.[0].length > match[1].length + 1;
    while (at < lines.length) {
      const blank = !lines[at].trim();
      if (blank ? !(at + 1 < lines.length && isInside(lines[at + 1])) : !isInside(lines[at])) break;
      inner.push(lines[at++].slice(Math.min(match[0].length, /^\s*/.exec(lines[at - 1])[0].length)));
    }
    const nodes = blocks(inner, depth + 1);
    element.append(make("li", ...nodes.flatMap((n) => (n.tagName === "P" ? [...n.childNodes] : n))));
    if (!lines[at]?.trim() && ITEM.test(lines[at + 1] ?? "")) at++;
  }
  return [element, at];
}

function starts(lines, at) {
  const line = lines[at];
  const isTable = line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-");
  return !line.trim() || [FENCE, HEADING, RULE, QUOTE, ITEM].some((p) => p.test(line)) || isTable;
}

function blocks(lines, depth = 0) {
  if (depth > DEEPEST) return [make("p", lines.join("\n"))];
  const nodes = [];
  const rest = (at, holds) => {
    let end = at;
    while (end < lines.length && holds(lines[end], end)) end++;
    return end;
  };
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    let match, end;
    if (!line.trim()) at++;
    else if ((match = FENCE.exec(line))) {
      const [, indent, fence, language] = match;
      const closes = new RegExp(`^\\s{0,3}\\${fence[0]}{${fence.length},}\\s*$`);
      end = rest(at + 1, (other) => !closes.test(other));
      const inside = lines.slice(at + 1, end).map((l) => l.replace(new RegExp(`^ {0,${indent.length}}`), ""));
      nodes.push(code(inside, language));
      at = end + 1;
    } else if ((match = HEADING.exec(line))) {
      nodes.push(make(`h${Math.min(6, match[1].length + 2)}`, ...inline(match[2])));
      at++;
    } else if (RULE.test(line)) at = nodes.push(make("hr")) && at + 1;
    else if (QUOTE.test(line)) {
      end = rest(at, (other) => QUOTE.test(other));
      const inner = lines.slice(at, end).map((other) => other.replace(QUOTE, ""));
      nodes.push(make("blockquote", ...blocks(inner, depth + 1)));
      at = end;
    } else if (ITEM.test(line)) {
      const [element, after] = list(lines, at, depth);
      nodes.push(element);
      at = after;
    } else if (starts(lines, at)) {
      end = rest(at, (other) => other.includes("|"));
      nodes.push(table(lines.slice(at, end)));
      at = end;
    } else {
      end = rest(at + 1, (_, i) => !starts(lines, i));
      nodes.push(make("p", ...inline(lines.slice(at, end).join("\n"))));
      at = end;
    }
  }
  return nodes;
}

/** The elements of a text in Markdown, whole or as far as it has come. */
export const render = (text) => blocks(text.replace(/\r\n?/g, "\n").split("\n"));
