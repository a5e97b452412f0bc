// A table or figure that is wider than the screen says so: the style sheet adds words to "wide".
function markWide() {
  for (const box of document.querySelectorAll(".bd-article .scroll, .bd-article .pst-scrollable-table-container"))
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
}
addEventListener("load", markWide);
addEventListener("resize", markWide);
addEventListener("toggle", markWide, true); // a fold that opens
