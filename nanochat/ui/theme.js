// Before anything is drawn, so that the page does not flash in the other colours.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("nanochat.settings"))?.theme ?? "";
} catch {
  document.documentElement.dataset.theme = ""; // storage is forbidden, or was written by something else
}
