// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// The tests of this folder keep the house rules that no compiler keeps.
package criproxy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/cri-proxy/cri-proxy"
	header = "// Copyright The cri-proxy Authors.\n// SPDX-License-Identifier: Apache-2.0\n"
)

var update = flag.Bool("update", false, "write the golden files")

// goFiles returns the Go files of this module and of the modules inside it.
func goFiles(t *testing.T) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || path == "bin"):
			return filepath.SkipDir
		case strings.HasSuffix(path, ".go"):
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no Go files found")
	}
	return files
}

func TestLicenseHeaders(t *testing.T) {
	for _, file := range goFiles(t) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		// A build constraint may come first.
		if strings.HasPrefix(text, "//go:build ") {
			_, text, _ = strings.Cut(text, "\n")
			text = strings.TrimLeft(text, "\n")
		}
		if !strings.HasPrefix(text, header) {
			t.Errorf("%s: does not begin with\n%s", file, header)
		}
	}
}

func TestPackagesHaveOneDocComment(t *testing.T) {
	docs := map[string][]string{} // by folder
	for _, file := range goFiles(t) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(file)
		if f.Doc != nil && strings.HasPrefix(f.Doc.Text(), "Copyright") {
			t.Errorf("%s: the license is the doc comment, put an empty line before the package clause", file)
		}
		if f.Doc != nil {
			docs[dir] = append(docs[dir], file)
		} else if docs[dir] == nil {
			docs[dir] = []string{}
		}
	}
	for dir, files := range docs {
		if len(files) != 1 {
			t.Errorf("%s: %d doc comments %v, want one", dir, len(files), files)
		}
	}
}

// goPackage is what is used of go list's answer.
type goPackage struct {
	ImportPath string
	Standard   bool
	Imports    []string
	// TestImports and XTestImports are those of the package's tests.
	TestImports, XTestImports []string
}

func goList(t *testing.T, args ...string) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go",
		append([]string{"list", "-json=ImportPath,Standard,Imports,TestImports,XTestImports"}, args...)...)
	// One answer on every machine.
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, &stderr)
	}
	var packages []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func within(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func TestForbiddenImports(t *testing.T) {
	for _, tt := range []struct {
		pkg     string
		deps    bool // what is linked counts, not only what is imported
		forbid  []string
		except  []string
		because string
	}{
		{
			pkg: "./proxy", deps: true,
			forbid: []string{"k8s.io", "sigs.k8s.io", module}, except: []string{"k8s.io/cri-api", module + "/proxy"},
			because: "the data path knows methods by name, not their meaning, and nothing of Kubernetes but the CRI",
		},
		{
			pkg: "./interceptors", deps: true,
			forbid:  []string{"k8s.io", "sigs.k8s.io", module},
			except:  []string{"k8s.io/cri-api", module + "/proxy", module + "/interceptors"},
			because: "kubelet's view is made from CRI messages alone",
		},
		{
			pkg: "./interceptors/view", deps: true,
			forbid:  []string{"k8s.io", "sigs.k8s.io", module},
			except:  []string{"k8s.io/cri-api", module + "/interceptors/view"},
			because: "the view is what kubelet is shown; it knows no calls and no connections",
		},
		{
			pkg: "./cmd/cri-proxy", deps: true,
			forbid: []string{module + "/controller", module + "/api/apps", module + "/api/inplace", module + "/test",
				"sigs.k8s.io/controller-runtime", "k8s.io/client-go", "k8s.io/api", "k8s.io/apiextensions-apiserver"},
			because: "the node binary links no controller code, and client-go would be a fifth of its memory",
		},
		{
			pkg: "./controller/...", deps: false,
			forbid: []string{
				module + "/proxy", module + "/interceptors", module + "/ops", module + "/systemd",
				module + "/internal/config", module + "/internal/daemon", module + "/internal/takeover",
				module + "/internal/opscli",
			},
			because: "the controller commands nodes over the ops API, it is not one",
		},
	} {
		t.Run(tt.pkg, func(t *testing.T) {
			args := []string{tt.pkg}
			if tt.deps {
				args = []string{"-deps", tt.pkg}
			}
			for _, p := range goList(t, args...) {
				found := p.Imports
				if tt.deps {
					found = []string{p.ImportPath}
				}
				for _, path := range found {
					is := func(root string) bool { return within(path, root) }
					if slices.ContainsFunc(tt.forbid, is) && !slices.ContainsFunc(tt.except, is) {
						t.Errorf("%s in %s: %s", path, tt.pkg, tt.because)
					}
				}
			}
		})
	}
}

// TestNothingImportsTheControllersRoot: the root wires the controllers together, so it is above all
// of them.
func TestNothingImportsTheControllersRoot(t *testing.T) {
	for _, p := range goList(t, "./controller/...") {
		for _, imports := range [][]string{p.Imports, p.TestImports, p.XTestImports} {
			if slices.Contains(imports, module+"/controller") {
				t.Errorf("%s imports the root of the controller", p.ImportPath)
			}
		}
	}
}

// TestBinaryDependencies keeps the list of packages that the node binary links: it runs as
// root on every node, so what comes in should be seen in a review.
func TestBinaryDependencies(t *testing.T) {
	const golden = "cmd/cri-proxy/deps.txt"
	var b strings.Builder
	b.WriteString("# What cri-proxy links besides the standard library. Renewed by: make generate\n")
	var names []string
	for _, p := range goList(t, "-deps", "./cmd/cri-proxy") {
		if !p.Standard {
			names = append(names, p.ImportPath)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		b.WriteString(n + "\n")
	}
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	known := strings.Split(string(want), "\n")
	for _, n := range names {
		if !slices.Contains(known, n) {
			t.Errorf("new dependency %s: if it earns its place on every node, run make generate and say why in the "+
				"commit", n)
		}
	}
	for _, n := range known {
		if n != "" && !strings.HasPrefix(n, "#") && !slices.Contains(names, n) {
			t.Errorf("%s is no longer linked: run make generate", n)
		}
	}
}
