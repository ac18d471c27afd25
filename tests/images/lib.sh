# shellcheck shell=bash
# Writes OCI image layouts with tar, sha256sum and printf, so that every byte of a test image is ours to choose.
# Sourced by tests/images/build, after hack/lib.sh.
#
# A recipe calls, in this order: `layer` for each layer from the lowest up, then `image`. An image for several
# platforms is several such images and one `index`. In between it sets what the image's configuration says:
#
#   entrypoint cmd env volumes ports labels     arrays
#   user workdir stop_signal                    strings
#   format=oci|docker                           whose media types the manifest uses
#   platform                                    architecture, by Go's names
#
# After `image` or `index` it may say `also REPOSITORY:TAG...`: the registry then has the same under these names, too.
#
# The layout directory also holds lists for hack/registry, as lines of words: `push` says what to upload in which order,
# `also` what to upload under further names, `damage` what to spoil in the registry's storage afterwards.

# Newer times are set back to this one, so that a recipe gives the same bytes every time: 2026-01-01.
EPOCH=1767225600

# recipe_start LAYOUT WORK: begins a layout in an empty directory, with a directory for scratch.
recipe_start() {
    layout="$1" work="$2"
    mkdir -p "$layout/blobs/sha256" "$work"
    printf '{"imageLayoutVersion":"1.0.0"}\n' >"$layout/oci-layout"
    : >"$layout/push"
    : >"$layout/also"
    : >"$layout/damage"
    manifests=()
    config_reset
}

# config_reset: back to a configuration that says nothing, without layers.
config_reset() {
    layers=() diff_ids=()
    entrypoint=() cmd=() env=() volumes=() ports=() labels=()
    user="" workdir="" stop_signal="" format=oci
    platform=$(dpkg --print-architecture)
}

# tree: prints a new empty directory to fill for a layer.
tree() {
    local directory
    directory=$(mktemp -d "$work/tree.XXXXXX")
    chmod 0755 "$directory"
    printf '%s' "$directory"
}

# put DIRECTORY PATH MODE [CONTENT]: a file in a layer, with the directories it needs.
put() {
    install -D -m "$3" /dev/null "$1/$2"
    [[ $# -lt 4 ]] || printf '%s' "$4" >"$1/$2"
}

# tar_of DIRECTORY [OPTION...]: prints the directory as a tar stream that depends on nothing but its content.
tar_of() {
    local directory="$1"
    shift
    tar --create --format=pax --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime \
        --sort=name --clamp-mtime --mtime="@$EPOCH" --numeric-owner --xattrs --xattrs-include='*' "$@" \
        --directory "$directory" .
}

# layer DIRECTORY|TAR [gzip|zstd|plain]: adds a layer, compressed as said (default gzip).
layer() {
    local tar="$1" compression="${2:-gzip}"
    if [[ -d $1 ]]; then
        tar=$(mktemp "$work/layer.XXXXXX")
        tar_of "$1" >"$tar"
    fi
    local blob="$tar.$compression"
    case $compression in
    gzip) gzip -n -6 <"$tar" >"$blob" ;;
    zstd) zstd -q -3 <"$tar" >"$blob" ;;
    plain) cp "$tar" "$blob" ;;
    esac
    layer_blob "$blob" "$compression" "$(digest_of "$tar")"
}

# layer_blob FILE COMPRESSION DIFF-ID: adds a layer whose bytes and uncompressed digest are given, true or not.
layer_blob() {
    local type=application/vnd.oci.image.layer.v1.tar digest
    [[ $format == oci ]] || type=application/vnd.docker.image.rootfs.diff.tar
    case $format-$2 in
    oci-gzip) type+=+gzip ;;
    docker-gzip) type+=.gzip ;;
    *-zstd) type+=+zstd ;;
    esac
    digest=$(blob "$1")
    layers+=("$(descriptor "$type" "$digest")")
    diff_ids+=("$3")
}

# image: writes the configuration and the manifest. Their digest is then in $manifest.
image() {
    local media=application/vnd.oci.image.manifest.v1+json type=application/vnd.oci.image.config.v1+json config
    if [[ $format == docker ]]; then
        media=application/vnd.docker.distribution.manifest.v2+json
        type=application/vnd.docker.container.image.v1+json
    fi
    configuration >"$work/config"
    config=$(blob "$work/config")
    {
        printf '{"schemaVersion":2,"mediaType":"%s",' "$media"
        printf '"config":%s,"layers":[%s]}' "$(descriptor "$type" "$config")" "$(joined "${layers[@]}")"
    } >"$work/manifest"
    manifest=$(store "$work/manifest")
    printf 'manifest %s %s\n' "$manifest" "$media" >>"$layout/push"
    manifests+=("$(descriptor "$media" "$manifest" ",\"platform\":{\"architecture\":\"$platform\",\"os\":\"linux\"}")")
    top="${manifests[-1]}"
}

# index: writes an index of all images so far, for a client to choose from by platform.
index() {
    local media=application/vnd.oci.image.index.v1+json digest
    printf '{"schemaVersion":2,"mediaType":"%s","manifests":[%s]}' "$media" "$(joined "${manifests[@]}")" >"$work/index"
    digest=$(store "$work/index")
    printf 'manifest %s %s\n' "$digest" "$media" >>"$layout/push"
    top=$(descriptor "$media" "$digest")
}

# also REPOSITORY:TAG...: further names of the last image or index.
also() {
    local name kind digest media
    read -r kind digest media < <(tail -n 1 "$layout/push")
    [[ $kind == manifest ]] || fail "nothing to name yet"
    for name in "$@"; do
        printf '%s %s %s %s\n' "${name%:*}" "${name##*:}" "$digest" "$media" >>"$layout/also"
    done
}

# recipe_end: names the last image or index `latest`.
recipe_end() {
    local reference='"annotations":{"org.opencontainers.image.ref.name":"latest"}'
    printf '{"schemaVersion":2,"manifests":[%s,%s}]}\n' "${top%\}}" "$reference" >"$layout/index.json"
    # The last thing pushed is the one that gets the tag.
    sed -i '$s/$/ latest/' "$layout/push"
}

# digest_of FILE
digest_of() {
    printf 'sha256:%s' "$(sha256sum <"$1" | cut -d' ' -f1)"
}

# store FILE: copies a file to the layout's blobs and prints its digest.
store() {
    local digest
    digest=$(digest_of "$1")
    cp "$1" "$layout/blobs/sha256/${digest#sha256:}"
    printf '%s' "$digest"
}

# blob FILE: the same for a file that is pushed as a blob.
blob() {
    local digest
    digest=$(store "$1")
    printf 'blob %s\n' "$digest" >>"$layout/push"
    printf '%s' "$digest"
}

# descriptor MEDIA-TYPE DIGEST [MORE-JSON]
descriptor() {
    local size
    size=$(stat -c %s "$layout/blobs/sha256/${2#sha256:}")
    printf '{"mediaType":"%s","digest":"%s","size":%d%s}' "$1" "$2" "$size" "${3:-}"
}

configuration() {
    local fields=() created
    created=$(date -u -d "@$EPOCH" +%Y-%m-%dT%H:%M:%SZ)
    [[ ${#entrypoint[@]} -eq 0 ]] || fields+=("\"Entrypoint\":$(json_array "${entrypoint[@]}")")
    [[ ${#cmd[@]} -eq 0 ]] || fields+=("\"Cmd\":$(json_array "${cmd[@]}")")
    [[ ${#env[@]} -eq 0 ]] || fields+=("\"Env\":$(json_array "${env[@]}")")
    [[ ${#volumes[@]} -eq 0 ]] || fields+=("\"Volumes\":$(json_set "${volumes[@]}")")
    [[ ${#ports[@]} -eq 0 ]] || fields+=("\"ExposedPorts\":$(json_set "${ports[@]}")")
    [[ ${#labels[@]} -eq 0 ]] || fields+=("\"Labels\":$(json_map "${labels[@]}")")
    [[ -z $user ]] || fields+=("\"User\":$(json_string "$user")")
    [[ -z $workdir ]] || fields+=("\"WorkingDir\":$(json_string "$workdir")")
    [[ -z $stop_signal ]] || fields+=("\"StopSignal\":$(json_string "$stop_signal")")
    printf '{"created":"%s","architecture":"%s","os":"linux",' "$created" "$platform"
    printf '"config":{%s},' "$(joined "${fields[@]}")"
    printf '"rootfs":{"type":"layers","diff_ids":%s}}' "$(json_array "${diff_ids[@]}")"
}

# joined ITEM...: the items with commas between them.
joined() {
    local IFS=,
    printf '%s' "$*"
}

json_string() {
    local text="${1//\\/\\\\}"
    printf '"%s"' "${text//\"/\\\"}"
}

json_array() {
    local item items=()
    for item in "$@"; do
        items+=("$(json_string "$item")")
    done
    printf '[%s]' "$(joined "${items[@]}")"
}

# json_set ITEM...: an object with an empty object for each item, as OCI writes sets.
json_set() {
    local item items=()
    for item in "$@"; do
        items+=("$(json_string "$item"):{}")
    done
    printf '{%s}' "$(joined "${items[@]}")"
}

# json_map KEY=VALUE...
json_map() {
    local item items=()
    for item in "$@"; do
        items+=("$(json_string "${item%%=*}"):$(json_string "${item#*=}")")
    done
    printf '{%s}' "$(joined "${items[@]}")"
}
