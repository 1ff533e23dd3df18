// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package callrecord_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"google.golang.org/grpc/codes"

	"github.com/cri-proxy/cri-proxy/internal/daemon/callrecord"
)

func TestUndecodableCallsAreRecorded(t *testing.T) {
	for _, method := range []string{
		"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "CreateContainer", "StartContainer", "StopContainer",
		"RemoveContainer", "UpdateContainerResources", "ContainerStatus", "ExecSync", "PullImage", "RemoveImage",
	} {
		path := filepath.Join(t.TempDir(), "calls")
		log, hook := logtest.NewNullLogger()
		f, err := callrecord.Open(path, log)
		if err != nil {
			t.Fatal(err)
		}
		full := "/runtime.v1.RuntimeService/" + method
		f.Record(full, []byte{0xff}, codes.NotFound)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var l callrecord.Line
		if err := json.Unmarshal(b, &l); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		l.Time = time.Time{}
		if l != (callrecord.Line{Method: full, Code: "NotFound"}) {
			t.Errorf("%s: %+v", method, l)
		}
		for _, e := range hook.AllEntries() {
			if e.Level < logrus.WarnLevel {
				t.Errorf("%s: %s", method, e.Message)
			}
		}
	}
}
