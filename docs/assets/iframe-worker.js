// Browsers start no worker for a page that is opened as a file. There, the search's worker runs in
// an empty frame instead, which has a window of its own: messages are passed on either way.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inner = frame.contentWindow
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.waiting = []
      this.receive = data => this.waiting.push(data)
      const script = inner.document.createElement("script")
      script.src = url
      script.onload = () => {
        this.receive = data => inner.dispatchEvent(new MessageEvent("message", { data }))
        this.waiting.splice(0).forEach(this.receive)
      }
      inner.document.body.append(script)
    }

    postMessage(data) {
      this.receive(data)
    }

    terminate() {}
  }
}
