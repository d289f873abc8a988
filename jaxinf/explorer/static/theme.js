// Before the page is drawn, so that it does not flash: the theme that was chosen here.
"use strict";
{
  const chosen = localStorage.getItem("jaxinf-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
