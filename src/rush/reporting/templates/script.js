"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // The walk through the sizes of the threat.
  for (const walk of all(".walk")) {
    const limits = JSON.parse(walk.dataset.limits);
    const input = walk.querySelector("input");
    const output = walk.querySelector("output");
    const known = ([proved, broken, held], epsilon) => {
      if (broken === 0) return "wrong";
      if (epsilon <= proved) return "proved";
      if (broken !== null && broken <= epsilon) return "broken";
      return epsilon <= held ? "held" : "open";
    };
    const size = (epsilon) =>
      walk.dataset.norm === "linf" ? `${(255 * epsilon).toFixed(2)}/255` : epsilon.toPrecision(3);
    const show = () => {
      // The slider's own value is rounded to its steps, and the threat need not be one of them.
      const near = Math.abs(input.value - walk.dataset.epsilon) < input.step / 2;
      const epsilon = Number(near ? walk.dataset.epsilon : input.value);
      const states = limits.map((image) => known(image, epsilon));
      output.value = near ? walk.dataset.threat : size(epsilon);
      input.setAttribute("aria-valuetext", output.value);
      for (const part of all("[data-share]", walk)) {
        const share = states.filter((state) => state === part.dataset.share).length / states.length;
        if (part.tagName === "B") part.textContent = `${(100 * share).toFixed(1)} %`;
        else part.style.width = `${100 * share}%`;
      }
      for (const badge of all("[data-place]")) {
        const state = states[badge.dataset.place];
        badge.dataset.state = state;
        badge.textContent = walk.querySelector(`[data-name="${state}"]`).textContent;
      }
    };
    input.disabled = false;
    input.addEventListener("input", show);
    show();
  }

  // Enlarged images.
  const dialog = document.querySelector("dialog");
  const buttons = all(".pictures button");
  if (dialog && buttons.length) {
    let place = 0;
    const open = (number) => {
      place = (number + buttons.length) % buttons.length;
      const card = buttons[place].closest("li");
      const images = all("img", card).map((image) => {
        const figure = document.createElement("figure");
        const caption = document.createElement("figcaption");
        caption.textContent = image.alt;
        figure.append(image.cloneNode(), caption);
        return figure;
      });
      dialog.querySelector(".three").replaceChildren(...images);
      dialog.querySelector(".caption").replaceChildren(...all(".said, .sizes", card).map((text) => text.cloneNode(true)));
      if (!dialog.open) dialog.showModal();
    };
    buttons.forEach((button, number) => {
      button.disabled = false;
      button.addEventListener("click", () => open(number));
    });
    dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) open(place + step);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.matches(".close")) dialog.close();
      else if (event.target.matches("[data-step]")) open(place + Number(event.target.dataset.step));
    });
  }

  // Figures as files. Programs other than browsers do not know the variables of the style sheet.
  for (const button of all("[data-svg]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const figure = button.closest("figure");
      const drawn = all("svg", figure).find((svg) => svg.getClientRects().length);
      const copy = drawn.cloneNode(true);
      const [, , width, height] = drawn.getAttribute("viewBox").split(" ");
      copy.setAttribute("width", width);
      copy.setAttribute("height", height);
      copy.setAttribute("font-family", "sans-serif");
      const text = new XMLSerializer().serializeToString(copy).replace(/var\(--\w+, (#\w+)\)/g, "$1");
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
      link.download = `${drawn.dataset.name.replace(/-(wide|narrow)$/, "")}.svg`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
})();
