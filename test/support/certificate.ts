/** A certificate that signs itself, written out by hand (RFC 5280): it serves for its names, and as the authority that a client is told to trust. */
import { generateKeyPairSync, randomBytes, sign } from 'node:crypto'

export type Certificate = { readonly key: string; readonly cert: string }

const day = 86_400_000

/** @param names DNS names it is valid for @param until end of its validity, ms since 1970 */
export function makeCertificate(names: readonly string[], until = Date.now() + 30 * day): Certificate {
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const algorithm = sequence(oid('2a8648ce3d040302'))
  const alternatives = sequence(...names.map((name) => der(0x82, Buffer.from(name))))
  const extensions = sequence(extension('551d11', alternatives), extension('551d13', sequence(der(0x01, Buffer.of(0xff)))))
  const serial = Buffer.concat([Buffer.of(1), randomBytes(8)])
  // Of several authorities with one name, a client may look at the first only.
  const issuer = sequence(der(0x31, sequence(oid('550403'), der(0x0c, Buffer.from(`test ${serial.toString('hex')}`)))))
  const content = sequence(
    der(0xa0, integer(Buffer.of(2))), integer(serial), algorithm, issuer,
    sequence(time(Math.min(Date.now(), until) - day), time(until)),
    issuer, publicKey.export({ type: 'spki', format: 'der' }), der(0xa3, extensions),
  )
  const signed = sequence(content, algorithm, der(0x03, Buffer.of(0), sign('sha256', content, privateKey)))
  const lines = signed.toString('base64').match(/.{1,64}/g) ?? []
  return { key: privateKey.export({ type: 'pkcs8', format: 'pem' }) as string, cert: ['-----BEGIN CERTIFICATE-----', ...lines, '-----END CERTIFICATE-----', ''].join('\n') }
}

/** Tag, length, content (X.690 8.1). */
function der(tag: number, ...parts: readonly Buffer[]): Buffer {
  const body = Buffer.concat(parts)
  const length = body.length < 128 ? Buffer.of(body.length) : body.length < 256 ? Buffer.of(0x81, body.length) : Buffer.of(0x82, body.length >> 8, body.length & 255)
  return Buffer.concat([Buffer.of(tag), length, body])
}

function sequence(...parts: readonly Buffer[]): Buffer {
  return der(0x30, ...parts)
}

function integer(bytes: Buffer): Buffer {
  return der(0x02, bytes)
}

function oid(hex: string): Buffer {
  return der(0x06, Buffer.from(hex, 'hex'))
}

function extension(hex: string, value: Buffer): Buffer {
  return sequence(oid(hex), der(0x04, value))
}

/** UTCTime, `YYMMDDHHMMSSZ`. */
function time(milliseconds: number): Buffer {
  return der(0x17, Buffer.from(`${new Date(milliseconds).toISOString().replaceAll(/[-:T]|\.\d+/g, '').slice(2)}`))
}
