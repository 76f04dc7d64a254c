// A chart's still gives way to the living chart when the reader comes near it; the libraries are loaded then.
(() => {
  const address = new URL("vega.js", document.currentScript.src);
  let loading;

  function load() {
    loading ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${address} was not loaded`));
      script.src = address;
      document.head.append(script);
    });
    return loading;
  }

  // Radio buttons under the chart's question, in a group that screen readers announce.
  function buttons({ name, value, bind }, choose) {
    const group = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = bind.name;
    group.append(legend);
    for (const option of bind.options) {
      const label = document.createElement("label");
      const button = document.createElement("input");
      Object.assign(button, { type: "radio", name, value: option, checked: option === value });
      button.addEventListener("change", () => choose(option));
      label.append(button, option);
      group.append(label);
    }
    return group;
  }

  // A menu beside its name.
  function menu({ name, value, bind }, choose) {
    const label = document.createElement("label");
    const list = document.createElement("select");
    list.name = name;
    for (const option of bind.options) list.add(new Option(option, option, option === value, option === value));
    list.addEventListener("change", () => choose(list.value));
    label.append(bind.name, list);
    return label;
  }

  for (const chart of document.querySelectorAll(".chart")) {
    const spec = JSON.parse(chart.querySelector("script").textContent);
    const still = chart.querySelector("img");
    let view;
    const controls = document.createElement("div");
    controls.className = "controls";
    for (const choice of spec.params) {
      const control = choice.bind.input === "radio" ? buttons : menu;
      controls.append(control(choice, (option) => {
        choice.value = option; // for a choice that is made before the chart lives
        view?.signal(choice.name, option).runAsync();
      }));
      delete choice.bind; // Vega would make one of its own
    }
    Object.assign(spec, { width: "container", autosize: { type: "fit-x", contains: "padding" } });
    const living = document.createElement("div");
    living.style.minHeight = `${still.offsetHeight}px`; // the page does not move when the chart comes
    chart.prepend(controls);
    chart.append(living);

    new IntersectionObserver(async (entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      try {
        await load();
        ({ view } = await vegaEmbed(living, spec, { actions: false, renderer: "svg" }));
        view.addEventListener("click", (event, item) => { // a mark that belongs to an option chooses it
          const button = [...controls.querySelectorAll("input")].find((one) => one.value === item?.datum?.choice);
          button?.click();
        });
        still.remove();
      } catch (error) {
        controls.remove(); // they would move nothing
        throw error;
      }
    }, { rootMargin: "200px" }).observe(chart);
  }
})();
