// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

// Install is what a run does with the files: it installs a binary, makes an instance run it, and
// makes people call it. The rest of a run needs systemd. Install returns the instance's directory.
func Install(prefix Prefix, instance, binary, says string) (dir string, err error) {
	l := prefix.layout()
	version, err := l.install(binary, says)
	if err == nil {
		err = l.use(instance, version)
	}
	if err == nil {
		err = link(l.binary(version), l.bin)
	}
	return l.instance(instance), err
}
