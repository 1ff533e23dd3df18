// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package installer

import "github.com/cri-proxy/cri-proxy/systemd/node/update"

// PrefixOf is the prefix below which Run puts the program, which needs a node to be seen.
func PrefixOf(o Options) (update.Prefix, error) { return (&installer{Options: o}).prefix() }
