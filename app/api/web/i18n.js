// The page's words in English and Chinese. Names of API fields stay as they are: they are what one types elsewhere.

const WORDS = {
  en: {
    skip: "Skip to the answer", completion: "Completion", chat: "Chat", mode: "Mode", composer: "Your request",
    examples: "Examples", try: "Try", system: "System prompt", prompt: "Prompt", message: "Message", run: "Run", send: "Send", stop: "Stop",
    newChat: "New chat", code: "Copy as code", codeKind: "Language", answer: "Answer", tokens: "Tokens of the answer",
    more: "Continue", copyText: "Copy text", copy: "Copy", copied: "Copied", copyFailed: "The browser did not allow to copy",
    branches: "Branches", save: "Save", load: "Load", close: "Close",
    noBranches: "Each run starts a tree here. Choose another token in the answer, and the tree gets a branch.",
    engine: "Engine", speed: "tokens/s", running: "running", waiting: "waiting",
    lastMinute: "Tokens per second, last minute", lastSteps: "Tokens in each of the last steps",
    decode: "decode", prefill: "prefill", cached: "from the cache", kv: "KV cache", kvUsed: "in use", kvShared: "shared",
    kvCached: "reusable", latency: "Last minute", ttft: "first token", itl: "between tokens",
    killHint: "Set max_tokens to 2000 and run this while the answer streams: the engine dies, a new one takes over, and the answer goes on.",
    settings: "Sampling", moreSettings: "All settings", reset: "Reset", changed: "{0} set", alternatives: "Other tokens for this place",
    keys: "Keyboard", keyTitle: "This server asks for a key", keyLabel: "API key, kept in this tab only", keyUse: "Use it",
    language: "中文", languageLabel: "Switch to Chinese", theme: "Light or dark", help: "Keyboard and help",
    probability: "Token probability",
    hintStart: "Press Run. Each token is coloured by how sure the model was of it.",
    hintTokens: "Click a token, or walk with ← → and press Enter, to see what else could stand there and go on from that. Dotted: another token was likelier.",
    hintTouch: "Tap a token to see what else could stand there and go on from that. Dotted: another token was likelier.",
    hintPlain: "Set logprobs to see how sure the model was of each token.",
    working: "Waiting for the first token…", stopped: "stopped", done: "Done", failed: "failed",
    nTokens: "{0} tokens", nToken: "1 token", perSecond: "{0} tokens/s", firstToken: "first token {0}", nCached: "{0} of {1} prompt tokens cached",
    cachedShort: "{0} cached", seed: "seed {0}", finish: "ended: {0}", space: "space", newline: "new line", part: "part of a character", endToken: "end",
    chosen: "drawn", rank: "rank {0}", id: "id {0}", picked: "your choice",
    own: "or write your own", ownLabel: "Your own text from here on", go: "Go",
    handOver: "engine {0} took over · {1} pause", handOverIdle: "engine {0} took over while idle", gen: "engine {0}",
    blocks: "{0} of {1} blocks, {2} tokens each", hits: "prefix hits {0}", peak: "peak {0}", stepOf: "largest {0}",
    starting: "starting", ready: "ready", restarting: "restarting", draining: "draining", failedState: "failed", offline: "no answer",
    badSetting: "{0}: give {1}.", wantedNumber: "a number within its limits", wantedIds: "token ids with commas between them", wantedJson: "a JSON object", badFile: "This file holds no branches of Headwater.", loaded: "{0} branches loaded",
    emptyPrompt: "Write a prompt first.", noFork: "This server gave no token ids for the prompt, so the answer cannot be forked.",
    k1: "run", k2: "stop; close", k3: "walk the tokens", k4: "open the alternatives of a token", k5: "choose an alternative", k6: "focus the prompt", k7: "this help",
    remove: "Remove this branch", user: "user", assistant: "assistant",
    chartSpeed: "Tokens per second over the last minute, now {0}", chartSteps: "The last {0} steps: {1} tokens decoded, {2} prefilled, {3} from the cache",
    chartKv: "{0} of {1} KV blocks in use, {2} shared, {3} reusable", schema: "JSON schema of the answer",
  },
  zh: {
    skip: "跳到回答", completion: "续写", chat: "对话", mode: "模式", composer: "请求", examples: "示例", try: "试试", system: "系统提示词",
    prompt: "提示词", message: "消息", run: "运行", send: "发送", stop: "停止", newChat: "新对话", code: "复制为代码", codeKind: "语言",
    answer: "回答", tokens: "回答的 token", more: "继续", copyText: "复制文本", copy: "复制", copied: "已复制",
    copyFailed: "浏览器不允许复制", branches: "分支", save: "保存", load: "载入", close: "关闭",
    noBranches: "每次运行在这里生成一棵树；在回答里换一个 token，树就多一个分支。",
    engine: "引擎", speed: "token/秒", running: "运行中", waiting: "等待中", lastMinute: "最近一分钟每秒 token 数",
    lastSteps: "最近各步的 token 数", decode: "解码", prefill: "预填充", cached: "来自缓存", kv: "KV 缓存", kvUsed: "使用中", kvShared: "共享",
    kvCached: "可复用", latency: "最近一分钟", ttft: "首 token", itl: "token 间隔",
    killHint: "把 max_tokens 设为 2000，在回答输出时运行这条命令：引擎被杀死，新引擎接管，回答继续。",
    settings: "采样", moreSettings: "全部设置", reset: "重置", changed: "已设 {0} 项", alternatives: "此处的其他 token",
    keys: "键盘", keyTitle: "此服务器需要密钥", keyLabel: "API 密钥，只保存在本标签页", keyUse: "使用",
    language: "EN", languageLabel: "切换到英文", theme: "浅色或深色", help: "键盘与帮助", probability: "token 概率",
    hintStart: "按“运行”。每个 token 按模型的把握程度着色。",
    hintTokens: "点一个 token，或用 ← → 移动再按 Enter，看这里还可能是什么，并从那里继续。虚线：另一个 token 更可能。",
    hintTouch: "点一个 token，看这里还可能是什么，并从那里继续。虚线：另一个 token 更可能。",
    hintPlain: "设置 logprobs，就能看到模型对每个 token 的把握。",
    working: "等待第一个 token…", stopped: "已停止", done: "完成", failed: "失败", nTokens: "{0} 个 token", nToken: "1 个 token", perSecond: "{0} token/秒",
    firstToken: "首 token {0}", nCached: "提示词 {1} 个 token 中 {0} 个来自缓存", cachedShort: "缓存 {0}", seed: "种子 {0}", finish: "结束：{0}",
    space: "空格", newline: "换行", part: "字符的一部分", endToken: "结束", chosen: "抽中", rank: "第 {0} 位", id: "id {0}", picked: "你的选择",
    own: "或自己写", ownLabel: "从这里起你自己的文字", go: "继续",
    handOver: "引擎 {0} 接管 · 停顿 {1}", handOverIdle: "引擎 {0} 在空闲时接管", gen: "引擎 {0}",
    blocks: "{1} 块中 {0} 块，每块 {2} 个 token", hits: "前缀命中 {0}", peak: "峰值 {0}", stepOf: "最大 {0}",
    starting: "启动中", ready: "就绪", restarting: "重启中", draining: "排空中", failedState: "失败", offline: "无应答",
    badSetting: "{0}：请填写{1}。", wantedNumber: "范围内的数字", wantedIds: "以逗号分隔的 token id", wantedJson: "一个 JSON 对象", badFile: "此文件里没有 Headwater 的分支。", loaded: "已载入 {0} 个分支", emptyPrompt: "请先写提示词。",
    noFork: "服务器没有给出提示词的 token id，无法分叉。",
    k1: "运行", k2: "停止；关闭", k3: "在 token 间移动", k4: "打开某个 token 的备选", k5: "选择一个备选", k6: "回到提示词", k7: "此帮助",
    remove: "删除此分支", user: "用户", assistant: "助手",
    chartSpeed: "最近一分钟每秒 token 数，当前 {0}", chartSteps: "最近 {0} 步：解码 {1} 个 token，预填充 {2} 个，来自缓存 {3} 个",
    chartKv: "{1} 个 KV 块中 {0} 个使用中，{2} 个共享，{3} 个可复用", schema: "回答的 JSON schema",
  },
};

let current = "en";

export const language = () => current;

export function setLanguage(name) {
  current = name in WORDS ? name : "en";
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
}

export function t(key, ...values) {
  const text = WORDS[current][key] ?? WORDS.en[key] ?? key;
  return text.replace(/\{(\d)\}/g, (_, index) => String(values[index] ?? ""));
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  return value < 0.995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 9.95 ? 2 : 1)} s`;
}

export const percent = (share, digits = 1) => `${(share * 100).toFixed(share >= 0.9995 || share === 0 ? 0 : digits)} %`;
