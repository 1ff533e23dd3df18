// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package logadapter_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/controller/logadapter"
)

func TestLogr(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	log.SetFormatter(&logrus.JSONFormatter{DisableTimestamp: true})
	l := logadapter.New(log).WithName("a").WithName("b").WithValues("k", 1)
	l.Info("hello", "odd")
	l.V(1).Info("not seen")
	l.Error(errors.New("broken"), "bye", "x", "y")
	want := `{"k":1,"level":"info","logger":"a.b","msg":"hello","odd":"(no value)"}` + "\n" +
		`{"error":"broken","k":1,"level":"error","logger":"a.b","msg":"bye","x":"y"}` + "\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	log.SetLevel(logrus.TraceLevel)
	if !l.V(7).Enabled() || l.V(8).Enabled() {
		t.Error("V(7) must be seen at trace, and the request bodies of V(8) never")
	}
}
