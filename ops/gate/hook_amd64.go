// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gate

import _ "embed"

//go:embed hook/hook_amd64
var hook []byte
