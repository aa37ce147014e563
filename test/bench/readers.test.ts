/** What the bench reads from its tools. Fixed texts: a number that is read wrongly makes every ratio wrong, silently. */
import t from 'tap'
import { readDnsperf } from '../../bench/dns-load.ts'
import { readH2load, readWrk } from '../../bench/http-load.ts'
import { readMemory, statTicks } from '../../bench/program.ts'
import { HeadReader } from '../../bench/raw-socket.ts'

t.test('processor time of a process whose name holds blanks and brackets', async (t) => {
  t.equal(statTicks('42 (a (b) c) S 1 42 42 0 -1 4194560 2600 300 1 2 70 30 5 6 20 0 11 0 900'), 111)
})

t.test('memory of a process: its own, not what it shares', async (t) => {
  const status = 'Name:\tnode\nVmRSS:\t  73000 kB\nRssAnon:\t   21004 kB\nRssFile:\t   51996 kB\n'
  t.equal(readMemory(status), 21_004 * 1024)
  t.ok(Number.isNaN(readMemory('Name:\tkthreadd\n')), 'a process without memory of its own has no figure')
})

t.test('a head in pieces, and what comes right behind it', async (t) => {
  const reader = new HeadReader()
  const feed = (text: string) => reader.feed(Buffer.from(text))
  t.equal(feed('HTTP/1.1 200 OK\r\nA: b\r'), null)
  t.same(feed('\n\r\nbody'), { head: 'HTTP/1.1 200 OK\r\nA: b\r\n\r\n', length: 3 })
  t.same(feed('HTTP/1.1 204 No\r\n\r\n'), { head: 'HTTP/1.1 204 No\r\n\r\n', length: 19 }, 'the next head begins anew')
})

t.test('wrk: the JSON line behind its own report', async (t) => {
  const report = 'Running 1s test @ http://127.0.0.1:1/\n  1 threads and 32 connections\nTransfer/sec: 1MB\n{"requests":20000,"microseconds":1000000,"bytes":9,"failed":0,"p50":1500,"p99":9000}\n'
  t.same(readWrk(report, 0.5), { cpu: 25, throughput: 20_000, p50: 1.5, p99: 9 })
  t.throws(() => readWrk('\n{"requests":20000,"microseconds":1000000,"bytes":9,"failed":3,"p50":1500,"p99":9000}\n', 0.5), /3 failed/)
  t.throws(() => readWrk('\n{"requests":0,"microseconds":1000000,"bytes":0,"failed":0,"p50":0,"p99":0}\n', 0.5), /0 requests/)
})

t.test('h2load: nearest-rank percentiles over the log', async (t) => {
  const log = Array.from({ length: 100 }, (_, index) => `1700000000000000\t200\t${(100 - index) * 10}\n`).join('')
  t.same(readH2load(log, 0.01), { cpu: 100, p50: 0.5, p99: 0.99 })
  t.throws(() => readH2load('1700000000000000\t503\t10\n', 0.01), /1 failed/)
  t.throws(() => readH2load('', 0.01), /failed/)
})

t.test('dnsperf: summary, and times when it lists answers', async (t) => {
  const summary = 'Statistics:\n\n  Queries sent:         4000\n  Queries completed:    4000 (100.00%)\n  Queries lost:         0 (0.00%)\n\n  Response codes:       NOERROR 4000 (100.00%)\n  Queries per second:   3999.5\n'
  t.same(readDnsperf(`> NOERROR a.example A 0.000200\n> NOERROR b.example A 0.000100\n${summary}`, 0.1), { cpu: 25, throughput: 3999.5, p50: 0.1, p99: 0.2 })
  const plain = readDnsperf(summary, 0.1)
  t.ok(Number.isNaN(plain.p50), 'no list of answers, no percentile')
  t.throws(() => readDnsperf(summary.replace('NOERROR 4000', 'SERVFAIL 4000'), 0.1), /0 with NOERROR/, 'quick refusals are not answers')
  t.throws(() => readDnsperf(summary.replace('NOERROR 4000', 'NOERROR 3900'), 0.1), /3900 with NOERROR/)
})
