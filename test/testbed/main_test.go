// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// helperEnv makes the test binary do something and wait to be killed: start a bed, see
// TestSweepAfterKill, or with the value helperGo run the go command.
const (
	helperEnv = "TESTBED_HELPER"
	helperGo  = "go"
)

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		if err := helper(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		select {}
	}
	goleak.VerifyTestMain(m)
}

// helper runs the go command, or starts a bed with a running pod and prints its ID.
func helper() error {
	ctx := context.Background()
	if os.Getenv(helperEnv) == helperGo {
		_, err := goCommand(ctx, "", nil, "build")
		return err
	}
	b, err := Start(ctx, Options{Mode: ModeNode, Direct: true, Log: os.Stderr})
	if err != nil {
		return err
	}
	if _, err := runPod(ctx, b, "orphan"); err != nil {
		return err
	}
	_, err = fmt.Println(b.ID)
	return err
}
