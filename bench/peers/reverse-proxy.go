// Go's own reverse proxy with nothing around it, on one processor: `reverse-proxy <port> <backend port>`.
package main

import (
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
)

func main() {
	target, err := url.Parse("http://127.0.0.1:" + os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns = 0
	transport.MaxIdleConnsPerHost = 256
	proxy.Transport = transport
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], proxy))
}
