// What only a browser knows of the page: texts that leave the window or cover each other, and how well they can be read.
() => {
  const luminance = ([r, g, b]) => {
    const part = (c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const outside = [], faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || element.closest("svg")) continue;
    const name = `${element.className}: ${element.textContent.slice(0, 40)}`;
    if (box.left < 0 || box.right > innerWidth + 0.5) outside.push(name);
    const [light, dark] = [getComputedStyle(element).color, 0].map((c, i) => luminance(i ? background(element) : numbers(c)))
      .sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) faint.push(`${name} ${contrast.toFixed(2)}`);
  }
  const covered = [];
  for (const figure of document.querySelectorAll("figure")) {
    const labels = [...figure.querySelectorAll("span")].map((span) => [span.textContent, span.getBoundingClientRect()]);
    labels.forEach(([one, a], i) => labels.slice(i + 1).forEach(([other, b]) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) covered.push(`${one} / ${other}`);
    }));
  }
  const bars = [...document.querySelectorAll("figure")].map((figure) =>
    [...figure.querySelectorAll(".hints rect")].map((rect) => rect.getBoundingClientRect().height));
  return { width: document.documentElement.scrollWidth, window: innerWidth, outside, faint, covered, bars };
}
