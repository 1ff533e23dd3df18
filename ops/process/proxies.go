// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/net/http/httpproxy"
)

// Getenv is os.Getenv for an environment such as that of [os.Environ].
func Getenv(environ []string, name string) string {
	for _, e := range environ {
		if value, ok := strings.CutPrefix(e, name+"="); ok {
			return value
		}
	}
	return ""
}

// Proxies are those of an environment, as a Go program takes them from its own
// ([net/http.ProxyFromEnvironment]).
func Proxies(environ []string) *httpproxy.Config {
	either := func(name string) string {
		if v := Getenv(environ, name); v != "" {
			return v
		}
		return Getenv(environ, strings.ToLower(name))
	}
	return &httpproxy.Config{
		HTTPProxy: either("HTTP_PROXY"), HTTPSProxy: either("HTTPS_PROXY"), NoProxy: either("NO_PROXY"),
		CGI: Getenv(environ, "REQUEST_METHOD") != "",
	}
}

// LookPath finds a program that is named without a directory as a process with that environment
// would. It returns the name itself if there is none.
func LookPath(environ []string, name string) string {
	for _, dir := range filepath.SplitList(Getenv(environ, "PATH")) {
		if path := filepath.Join(dir, name); filepath.IsAbs(path) {
			if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
				return path
			}
		}
	}
	return name
}
