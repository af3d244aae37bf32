"use strict";
(function () {
  // Okabe and Ito's palette, lightened so that dark text stands on it; then lines below tell experts apart.
  var COLOURS = ["#f5c56b", "#9fd8f7", "#7fd6b9", "#f6ee8a", "#8db9e6", "#f0a877", "#e6b3d0", "#cfcfcf"];
  var LINES = ["transparent", "solid", "dashed", "dotted", "double"];
  var samples = JSON.parse(document.getElementById("samples").textContent);

  function bytes(text) {
    var raw = atob(text), out = new Uint8Array(raw.length);
    for (var i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return new DataView(out.buffer);
  }
  function half(bits) {
    var sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * Math.pow(2, -24);
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * Math.pow(2, exponent - 15);
  }
  function make(tag, text, className) {
    var node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  }
  function role(node, name) {  // said, as a table that is laid out as cards is none any more to some readers
    node.setAttribute("role", name);
    return node;
  }
  function show(value, digits) {
    return value === null || Number.isNaN(value) ? "–" : value.toFixed(digits === undefined ? 3 : digits);
  }
  function paint(node, expert) {
    if (expert < 0) {
      node.style.background = "#ffffff";
      node.style.borderBottom = "3px solid #111";
      return;
    }
    node.style.background = COLOURS[expert % COLOURS.length];
    var line = LINES[Math.floor(expert / COLOURS.length) % LINES.length];
    node.style.borderBottom = line === "transparent" ? "3px solid transparent" : "3px " + line + " #333";
  }
  function expertName(expert) { return expert < 0 ? "null" : String(expert); }

  samples.forEach(function (one) {
    var L = one.layers.length, K = one.topk, E = one.experts;
    var choices = bytes(one.choices), scores = bytes(one.scores), floats = {};
    ["margin", "state_norm", "update_gate", "reset_gate"].forEach(function (name) {
      floats[name] = one[name] === null ? null : bytes(one[name]);
    });
    one.choice = function (t, l, k) { return choices.getInt16(2 * ((t * L + l) * K + k), true); };
    one.score_of = function (t, l, e) { return half(scores.getUint16(2 * ((t * L + l) * E + e), true)); };
    one.number = function (name, t, l) { return floats[name] ? floats[name].getFloat32(4 * (t * L + l), true) : null; };
    one.has = function (name) { return floats[name] !== null; };
  });

  function textOf(one, id) {
    if (id < 0) return "▢";
    var text = one.texts[String(id)];
    return text === undefined ? "⟨" + id + "⟩" : text;
  }
  function visible(text) {
    return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
  }

  function Panel(one, number) {
    var panel = this;
    this.one = one; this.layer = 0; this.only = null; this.current = -1; this.nodes = [];
    this.root = make("article", null, "panel");
    this.root.dataset.model = one.name;
    this.root.appendChild(make("h3", one.name));
    var controls = make("div", null, "controls"), label = make("label", "Layer ");
    this.select = make("select");
    this.select.id = "layer-" + number;
    label.htmlFor = this.select.id;
    one.layers.forEach(function (layer, l) {
      var option = make("option", String(layer));
      option.value = l;
      panel.select.appendChild(option);
    });
    this.select.addEventListener("change", function () { panel.layer = Number(panel.select.value); panel.colour(); });
    label.appendChild(this.select);
    controls.appendChild(label);
    this.root.appendChild(controls);
    this.legend = make("div", null, "legend");
    this.legend.setAttribute("role", "group");
    this.legend.setAttribute("aria-label", "Experts of " + one.name);
    this.root.appendChild(this.legend);
    this.text = make("div", null, "text");
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "Text as routed by " + one.name);
    this.root.appendChild(this.text);
    this.details = make("div", null, "details");
    this.details.setAttribute("aria-live", "polite");
    this.details.appendChild(make("p", "No token is chosen yet."));
    this.root.appendChild(this.details);
    this.text.addEventListener("click", function (event) {
      var node = event.target.closest(".token");
      if (node) choose(panel, Number(node.dataset.place));
    });
    this.text.addEventListener("keydown", function (event) {
      var node = event.target.closest(".token");
      if (!node) return;
      var place = Number(node.dataset.place);
      var step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[event.key];
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(panel, place); return; }
      if (event.key === "Home") step = -place;
      if (event.key === "End") step = panel.nodes.length - 1 - place;
      if (step === undefined) return;
      event.preventDefault();
      var next = Math.min(Math.max(place + step, 0), panel.nodes.length - 1);
      panel.reach(next);
      panel.nodes[next].focus();
    });
  }
  Panel.prototype.reach = function (place) {
    this.nodes.forEach(function (node, i) { node.tabIndex = i === place ? 0 : -1; });
  };
  Panel.prototype.fill = function (piece) {
    var panel = this, one = this.one, part = document.createDocumentFragment();
    this.piece = piece;
    this.nodes = [];
    this.current = -1;
    this.text.textContent = "";
    this.details.textContent = "";
    this.details.appendChild(make("p", "No token is chosen yet."));
    for (var i = 0; i < piece.count; i++) {
      var text = textOf(one, one.token[piece.start + i]);
      var node = make("span", text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥"), "token");
      node.dataset.place = i;
      node.setAttribute("role", "button");
      node.tabIndex = i === 0 ? 0 : -1;
      panel.nodes.push(node);
      part.appendChild(node);
    }
    this.text.appendChild(part);
    this.text.scrollTop = 0;
    this.colour();
  };
  Panel.prototype.colour = function () {
    var panel = this, one = this.one, counts = {};
    this.nodes.forEach(function (node, i) {
      var expert = one.choice(panel.piece.start + i, panel.layer, 0);
      counts[expert] = (counts[expert] || 0) + 1;
      paint(node, expert);
      node.dataset.expert = expert;
      node.classList.toggle("off", panel.only !== null && panel.only !== expert);
      node.title = "expert " + expertName(expert);
    });
    this.legend.textContent = "";
    var experts = one.nulls ? [-1] : [];
    for (var e = 0; e < one.experts; e++) experts.push(e);
    experts.forEach(function (expert) {
      var share = panel.nodes.length ? 100 * (counts[expert] || 0) / panel.nodes.length : 0;
      var button = make("button", expertName(expert) + ": " + share.toFixed(0) + " %");
      button.type = "button";
      paint(button, expert);
      button.setAttribute("aria-pressed", String(panel.only === expert));
      button.title = "expert " + expertName(expert) + " has " + share.toFixed(1) + " % of these tokens as their best";
      button.addEventListener("click", function () {
        panel.only = panel.only === expert ? null : expert;
        panel.colour();
        panel.legend.children[experts.indexOf(expert)].focus();
      });
      panel.legend.appendChild(button);
    });
  };
  Panel.prototype.tell = function (place) {
    var panel = this, one = this.one, t = this.piece.start + place;
    if (this.current >= 0) this.nodes[this.current].removeAttribute("aria-current");
    this.current = place;
    this.nodes[place].setAttribute("aria-current", "true");
    this.reach(place);
    var box = this.details, path = [];
    box.textContent = "";
    box.appendChild(make("h4", "Token " + place + ": " + visible(textOf(one, one.token[t]))));
    var said = one.token[t] < 0 ? "Which token it is was not recorded." : "id " + one.token[t] + ", next " + visible(textOf(one, one.next[t]));
    if (one.predicted[t] >= 0) said += ", predicted " + visible(textOf(one, one.predicted[t]));
    box.appendChild(make("p", said));
    one.layers.forEach(function (_, l) { path.push(expertName(one.choice(t, l, 0))); });
    box.appendChild(make("p", "Path of best experts: " + path.join(" – "), "path"));
    var columns = [["margin", "margin, logits"], ["state_norm", "state length"], ["update_gate", "update gate"],
      ["reset_gate", "reset gate"]].filter(function (column) { return one.has(column[0]); });
    var table = role(make("table", null, "cards"), "table"), head = role(make("tr"), "row");
    table.setAttribute("aria-label", "The token through the layers of " + one.name);
    ["layer", "experts (scores)"].concat(columns.map(function (column) { return column[1]; }), ["all scores"])
      .forEach(function (name, i) {
        var cell = role(make("th", name, i === 0 || (i > 1 && i < columns.length + 2) ? "h" : ""), "columnheader");
        cell.scope = "col";
        head.appendChild(cell);
      });
    role(table.appendChild(make("thead")), "rowgroup").appendChild(head);
    var body = role(table.appendChild(make("tbody")), "rowgroup");
    var most = 0, full = 1, flat = 1 / (one.experts + one.nulls), e, l;
    for (l = 0; l < one.layers.length; l++)
      for (e = 0; e < one.experts; e++) most = Math.max(most, one.score_of(t, l, e));
    while (full / 2 >= most && full > 1 / 1024) full /= 2;
    one.layers.forEach(function (layer, l) {
      var row = role(make("tr"), "row"), chosen = [], bars = make("span", null, "bars"), best = 0;
      function cell(text, name, className) {
        var made = role(make("td", text, className), "cell");
        made.dataset.name = name;
        row.appendChild(made);
        return made;
      }
      for (var k = 0; k < one.topk; k++) {
        e = one.choice(t, l, k);
        chosen.push(e < 0 ? "null" : e + " (" + show(one.score_of(t, l, e)) + ")");
      }
      for (e = 0; e < one.experts; e++) {
        var bar = make("span", null, "bar"), score = one.score_of(t, l, e);
        best = Math.max(best, score);
        bar.style.height = Math.max(1, 40 * score / full) + "px";
        bar.title = "expert " + e + ": " + show(score, 4);
        bar.style.background = COLOURS[e % COLOURS.length];
        bars.appendChild(bar);
      }
      bars.setAttribute("role", "img");
      bars.setAttribute("aria-label", "scores of experts 0 to " + (one.experts - 1) + ", greatest " + show(best));
      if (one.score === "softmax" && flat <= full) {
        var chance = make("i");
        chance.style.bottom = 40 * flat / full + "px";
        chance.title = "flat scores: " + show(flat, 4);
        bars.appendChild(chance);
      }
      cell(String(layer), "layer", "n");
      var experts = cell(null, "experts (scores)", "two");
      chosen.forEach(function (one, k) {  // a line ends between them alone
        if (k) experts.appendChild(document.createTextNode(", "));
        experts.appendChild(make("span", one, "w"));
      });
      columns.forEach(function (column) { cell(show(one.number(column[0], t, l)), column[1], "n"); });
      cell(null, "all scores", "all").appendChild(bars);
      body.appendChild(row);
    });
    box.appendChild(table);
    var told = "Bars: scores of experts 0 to " + (one.experts - 1) + "; the full height is " + full;
    if (one.score === "softmax" && flat <= full)
      told += "; dashed: flat scores, 1/" + (one.nulls ? "(" + one.experts + " + " + one.nulls + " null)" : one.experts);
    box.appendChild(make("p", told + ".", "c"));
  };

  var panels = samples.map(function (one, number) { return new Panel(one, number); });
  var host = document.getElementById("panels"), picker = document.getElementById("piece");
  panels.forEach(function (panel) { host.appendChild(panel.root); });
  function choose(panel, place) {
    panel.tell(place);
    // the same token of the other models, where they show the same text
    panels.forEach(function (other) {
      if (other === panel || place >= other.nodes.length) return;
      var mine = panel.nodes[place].textContent, theirs = other.nodes[place].textContent;
      if (other.nodes.length === panel.nodes.length && mine === theirs) other.tell(place);
    });
  }
  function keyOf(piece) { return JSON.stringify([piece.domain, piece.window]); }
  var keys = {};
  samples.forEach(function (one) {
    one.pieces.forEach(function (piece) {
      var key = keyOf(piece);
      if (keys[key]) return;
      keys[key] = true;
      var option = make("option", piece.domain + ", window " + piece.window);
      option.value = key;
      picker.appendChild(option);
    });
  });
  function open() {
    panels.forEach(function (panel) {
      var piece = panel.one.pieces.filter(function (one) { return keyOf(one) === picker.value; })[0];
      panel.fill(piece || { start: 0, count: 0 });
      if (!piece) panel.details.firstChild.textContent = "This model's sample has no such window.";
    });
  }
  picker.addEventListener("change", open);
  open();
  // boxes with more than the screen shows say so
  document.querySelectorAll(".box").forEach(function (box) {
    var scroll = box.querySelector(".scroll"), hint = box.querySelector(".hint");
    function look() {
      hint.hidden = scroll.scrollWidth <= scroll.clientWidth + 1;
      box.classList.toggle("more", scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft > 1);
      scroll.tabIndex = hint.hidden ? -1 : 0;
    }
    scroll.addEventListener("scroll", look);
    new ResizeObserver(look).observe(scroll);  // a width of its own too, when what folds it is opened
    look();
  });
  document.documentElement.dataset.ready = "true";
})();
