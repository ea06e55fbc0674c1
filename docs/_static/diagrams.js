// Draws <pre class="mermaid">. Mermaid itself (3.5 MB) is loaded only by pages that have a diagram, from beside this file.
(() => {
  const home = new URL(".", document.currentScript.src);
  const dark = () => {
    const theme = document.body.dataset.theme;
    return theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  };
  const colours = () => dark()
    ? { background: "#131416", primaryColor: "#2b2415", primaryBorderColor: "#f2b84b", primaryTextColor: "#e9e6df", lineColor: "#b9a77c",
        secondaryColor: "#1f2a33", tertiaryColor: "#1b1c1f", textColor: "#e9e6df", noteBkgColor: "#2b2415", noteTextColor: "#e9e6df", noteBorderColor: "#7d6a3a" }
    : { background: "#ffffff", primaryColor: "#fff6e0", primaryBorderColor: "#b98212", primaryTextColor: "#2a2520", lineColor: "#7d6a3a",
        secondaryColor: "#eef4f8", tertiaryColor: "#faf8f4", textColor: "#2a2520", noteBkgColor: "#fff6e0", noteTextColor: "#2a2520", noteBorderColor: "#d9c27f" };
  let count = 0;
  async function draw(places) {
    mermaid.initialize({ startOnLoad: false, securityLevel: "strict", theme: "base", darkMode: dark(),
      flowchart: { rankSpacing: 28, nodeSpacing: 32 },
      themeVariables: { ...colours(), fontFamily: getComputedStyle(document.body).fontFamily, fontSize: "15px" } });
    for (const place of places) {
      try {
        const narrow = place.node.clientWidth < 560;            // a phone: from top to bottom, or nobody could read it
        const text = narrow ? place.text.replace(/^(\s*(?:flowchart|graph)) (?:LR|RL)\b/, "$1 TB") : place.text;
        const { svg } = await mermaid.render(`diagram-${count++}`, text);
        place.node.innerHTML = svg;
        place.node.classList.add("drawn");
      } catch (error) { place.node.textContent = place.text; console.error(error); }
    }
  }
  document.addEventListener("DOMContentLoaded", () => {
    const places = [...document.querySelectorAll("pre.mermaid")].map((node) => ({ node, text: node.textContent }));
    if (!places.length) return;
    const script = document.createElement("script");
    script.src = new URL("mermaid.min.js", home);
    script.onload = () => {
      let drawn = dark();
      let busy = draw(places);
      const again = () => { if (dark() !== drawn) { drawn = dark(); busy = busy.then(() => draw(places)); } };
      new MutationObserver(again).observe(document.body, { attributeFilter: ["data-theme"] });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    };
    document.head.append(script);
  });
})();
