// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package probes_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/controller/probes"
)

// What is no failure is told to who asks for more than yes or no, and keeps nobody from being
// Ready.
func TestProbes(t *testing.T) {
	text := "left to OpenKruise"
	h := probes.New()
	h.Note("OpenKruise", func() string { return text })
	var webhook error
	h.Check("webhook", func(*http.Request) error { return webhook })
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		h.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	for _, tt := range []struct {
		path, want, not string
		code            int
	}{
		{"/readyz", "ok", "note", 200},
		{"/readyz/ping", "ok", "note", 200},
		{"/readyz?verbose", "[+]webhook ok\nreadyz check passed\nnote: OpenKruise: left to OpenKruise\n", "", 200},
		{"/healthz", "ok", "note", 200},
		{"/healthz/ping", "ok", "note", 200},
	} {
		want := strings.ReplaceAll(tt.want, "readyz check", "healthz check") // as controller-runtime says it
		if code, body := get(tt.path); code != tt.code || !strings.Contains(body, want) || tt.not != "" &&
			strings.Contains(body, tt.not) {
			t.Errorf("%s: %d %q", tt.path, code, body)
		}
	}
	text, webhook = "", errors.New("not started")
	if code, body := get("/readyz?verbose"); code != 500 || !strings.Contains(body, "[-]webhook failed") ||
		strings.Contains(body, "note") {
		t.Errorf("%d %q", code, body)
	}
}
