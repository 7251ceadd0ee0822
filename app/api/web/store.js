// What the browser keeps from visit to visit; where it keeps nothing, for this visit only.

export const store = {
  read(name) {
    try {
      return localStorage.getItem(`headwater-${name}`);
    } catch {
      return null;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`headwater-${name}`, value);
    } catch { /* kept for this visit only */ }
  },
};
