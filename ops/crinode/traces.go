// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package crinode

import (
	"errors"
	"io/fs"
	"os"
)

// RemoveTraces removes files that a container has left on the node. Empty names and files that do
// not exist are no error.
func (c *Client) RemoveTraces(files []string) {
	for _, f := range files {
		if f == "" {
			continue
		}
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.Log.WithError(err).Warn("trace of a removed container left")
		}
	}
}
