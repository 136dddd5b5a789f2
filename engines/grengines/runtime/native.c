/* Loops over the requests of a batch that NumPy would do with several calls for each request.

   grengines/runtime/native.py compiles this file. Each function has a form in NumPy beside its caller, with the same
   result: grengines.runtime.batch, grengines.cache.places, grengines.cache.history. */

#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>
#include <string.h>

typedef struct {
    const char *data;
    npy_intp n, stride;
} Column;

/* Columns of a served request point into the body of its call, at any address. */
static inline npy_int64 int_at(Column column, npy_intp i) {
    npy_int64 value;
    memcpy(&value, column.data + i * column.stride, sizeof value);
    return value;
}

static inline npy_float32 float_at(Column column, npy_intp i) {
    npy_float32 value;
    memcpy(&value, column.data + i * column.stride, sizeof value);
    return value;
}

static PyObject *s_items, *s_actions, *s_weights, *s_timestamps, *s_timestamp; /* of Request */
static PyObject *s_pages, *s_cached, *s_stored;                                /* of Plan */
static PyObject *columns_of_history[4];                                        /* of History */

static void release(PyObject **held, int n) {
    for (int i = 0; i < n; i++) Py_CLEAR(held[i]);
}

static int number(PyObject *owner, PyObject *name, npy_int64 *out) {
    PyObject *found = PyObject_GetAttr(owner, name);
    if (found == NULL) return 0;
    *out = PyLong_AsLongLong(found);
    Py_DECREF(found);
    return *out != -1 || !PyErr_Occurred();
}

static npy_int64 entry(PyObject *list, Py_ssize_t i) { return PyLong_AsLongLong(PyList_GET_ITEM(list, i)); }

static int set(PyObject *list, Py_ssize_t i, npy_int64 value) {
    PyObject *made = PyLong_FromLongLong(value);
    if (made == NULL) return 0;
    PyList_SET_ITEM(list, i, made);
    return 1;
}

static int is_column(PyObject *array, char kind, int size) {
    if (!PyArray_Check(array)) return 0;
    PyArrayObject *a = (PyArrayObject *)array;
    return PyArray_NDIM(a) == 1 && PyArray_DESCR(a)->kind == kind && PyArray_ITEMSIZE(a) == size &&
           PyArray_ISNOTSWAPPED(a);
}

static Column as_column(PyObject *array) {
    PyArrayObject *a = (PyArrayObject *)array;
    Column column = {PyArray_BYTES(a), PyArray_DIM(a, 0), PyArray_STRIDE(a, 0)};
    return column;
}

static int column(PyObject *array, char kind, int size, const char *what, Column *out) {
    if (array == NULL) return 0;
    if (!is_column(array, kind, size)) {
        PyErr_Format(PyExc_TypeError, "%s must be %s with one dimension, as grengines.api.Request says; got %R", what,
                     kind == 'i' ? "int64" : "float32", array);
        return 0;
    }
    *out = as_column(array);
    return 1;
}

static npy_int64 *numbers(PyObject *array, Py_ssize_t least) {
    if (!is_column(array, 'i', 8) || !PyArray_ISCARRAY((PyArrayObject *)array) ||
        PyArray_DIM((PyArrayObject *)array, 0) < least) {
        PyErr_Format(PyExc_ValueError, "the buffer must be int64 [at least %zd] without gaps", least);
        return NULL;
    }
    return PyArray_DATA((PyArrayObject *)array);
}

static PyObject *layout(PyObject *self, PyObject *args) {
    PyObject *requests, *candidates, *done;
    Py_ssize_t context, least;
    if (!PyArg_ParseTuple(args, "O!O!Onn", &PyList_Type, &requests, &PyList_Type, &candidates, &done, &context, &least))
        return NULL;
    Py_ssize_t B = PyList_GET_SIZE(requests);
    if (PyList_GET_SIZE(candidates) != B || (done != Py_None && (!PyList_Check(done) || PyList_GET_SIZE(done) != B)))
        return PyErr_Format(PyExc_ValueError, "the lists must have an entry for each of %zd requests", B);
    PyObject *lists[7] = {NULL}; /* targets, events, contextual, histories, cached, new, q_offsets */
    for (int i = 0; i < 7; i++)
        if ((lists[i] = PyList_New(i == 6 ? B + 1 : B)) == NULL) goto failed;
    npy_int64 tokens = 0, wanted = 0, longest = 0, most = 0, keys = 0;
    for (Py_ssize_t b = 0; b < B; b++) {
        Column items, chosen;
        PyObject *held = PyObject_GetAttr(PyList_GET_ITEM(requests, b), s_items);
        int found = column(held, 'i', 8, "history_items", &items) &&
                    column(PyList_GET_ITEM(candidates, b), 'i', 8, "candidates", &chosen);
        Py_XDECREF(held); /* only the lengths are used */
        if (!found) goto failed;
        npy_int64 own = items.n >= least ? context : 0, history = own + items.n;
        npy_int64 cached = done == Py_None ? 0 : entry(done, b);
        if (PyErr_Occurred()) goto failed;
        if (cached < 0 || cached > history || (context && cached && cached != history)) {
            release(lists, 7);
            Py_RETURN_NONE; /* the form in Python says what is wrong */
        }
        npy_int64 values[7] = {chosen.n, items.n, own, history, cached, history - cached + chosen.n, tokens};
        for (int i = 0; i < 7; i++)
            if (!set(lists[i], b, values[i])) goto failed;
        tokens += values[5];
        wanted += chosen.n;
        longest = values[5] > longest ? values[5] : longest;
        most = chosen.n > most ? chosen.n : most;
        keys = history + chosen.n > keys ? history + chosen.n : keys;
    }
    if (!set(lists[6], B, tokens)) goto failed;
    return Py_BuildValue("NNNNNNN(nLLLLL)", lists[0], lists[1], lists[2], lists[3], lists[4], lists[5], lists[6], B,
                         tokens, wanted, longest, most, keys);
failed:
    release(lists, 7);
    return NULL;
}

/* floor(log2(1 + gap)), at most `most`, by the exponent of a double, as the form in NumPy computes it */
static inline npy_int64 time_bucket(npy_int64 gap, npy_int64 most) {
    double one_more = (double)(gap > 0 ? gap : 0) + 1.0;
    npy_int64 bits;
    memcpy(&bits, &one_more, sizeof bits);
    npy_int64 exponent = (bits >> 52) - 1023;
    return exponent < most ? exponent : most;
}

static inline npy_int64 row_of(npy_int64 item, npy_int64 rows) {
    if ((npy_uint64)item < (npy_uint64)rows) return item; /* dividing takes ten times as long as looking */
    npy_int64 rest = item % rows;
    return rest < 0 ? rest + rows : rest;
}

static void fill(npy_int64 *out, Py_ssize_t begin, Py_ssize_t end, npy_int64 value) {
    for (Py_ssize_t i = begin; i < end; i++) out[i] = value;
}

static PyObject *write_tokens(PyObject *self, PyObject *args) {
    PyObject *buffer, *requests, *candidates, *cached, *contextual;
    Py_ssize_t tokens, wanted, sequences, offsets_at;
    long long item_rows, mask, candidate_action, last_position, time_buckets;
    int appends, combinations;
    if (!PyArg_ParseTuple(args, "OO!O!O!O!nnnnpLLpLLL", &buffer, &PyList_Type, &requests, &PyList_Type, &candidates,
                          &PyList_Type, &cached, &PyList_Type, &contextual, &tokens, &wanted, &sequences, &offsets_at,
                          &appends, &item_rows, &mask, &combinations, &candidate_action, &last_position, &time_buckets))
        return NULL;
    Py_ssize_t B = PyList_GET_SIZE(requests), at = 0, placed = 0, keys = 0, kept = 0;
    if (item_rows < 1 || time_buckets < 1 || (combinations && (mask < 0 || mask > 63)))
        return PyErr_Format(PyExc_ValueError,
                            "item_rows=%lld and time_buckets=%lld must be at least 1, and the mask of combinations "
                            "0 to 63; got %lld", item_rows, time_buckets, mask);
    if (tokens < 0 || wanted < 0 || offsets_at < 5 * tokens + wanted || B > sequences ||
        PyList_GET_SIZE(candidates) != B || PyList_GET_SIZE(cached) != B || PyList_GET_SIZE(contextual) != B)
        return PyErr_Format(PyExc_ValueError, "%zd requests don't fit the sizes or the lists", B);
    npy_int64 *rows = numbers(buffer, offsets_at + (appends ? 4 : 2) * (sequences + 1) + sequences);
    if (rows == NULL) return NULL;
    npy_int64 *offsets[4], *num_targets = rows + offsets_at + (appends ? 4 : 2) * (sequences + 1);
    for (int i = 0; i < 4; i++) offsets[i] = rows + offsets_at + i * (sequences + 1);
    npy_int64 *actions = rows + tokens, *positions = rows + 3 * tokens, *buckets = rows + 4 * tokens;
    npy_int64 *candidate_rows = rows + 5 * tokens, *arrays[5] = {rows, actions, rows + 2 * tokens, positions, buckets};
    double *weights = (double *)arrays[2];
    npy_int64 most = time_buckets - 1;
    PyObject *held[4] = {NULL}; /* the columns of a request while they are read */
    for (Py_ssize_t b = 0; b < B; b++) {
        PyObject *r = PyList_GET_ITEM(requests, b);
        Column items, masks, weighed, times, chosen;
        npy_int64 now;
        if (!column(held[0] = PyObject_GetAttr(r, s_items), 'i', 8, "history_items", &items) ||
            !column(held[1] = PyObject_GetAttr(r, s_actions), 'i', 8, "history_actions", &masks) ||
            !column(held[2] = PyObject_GetAttr(r, s_weights), 'f', 4, "history_weights", &weighed) ||
            !column(held[3] = PyObject_GetAttr(r, s_timestamps), 'i', 8, "history_timestamps", &times) ||
            !column(PyList_GET_ITEM(candidates, b), 'i', 8, "candidates", &chosen) || !number(r, s_timestamp, &now))
            goto failed;
        npy_int64 first = entry(cached, b) - entry(contextual, b), events = items.n, targets = chosen.n;
        first = first > 0 ? first : 0;
        npy_int64 history = entry(contextual, b) + events;
        Py_ssize_t last = at + history - entry(cached, b) + targets, end = last - targets, begin = end - (events - first);
        if (PyErr_Occurred()) goto failed;
        if (masks.n != events || weighed.n != events || times.n != events || begin < at || last > tokens ||
            first > events || placed + targets > wanted) {
            PyErr_Format(PyExc_ValueError, "request %zd of the batch: its arrays have other lengths", b);
            goto failed;
        }
        for (int a = 0; a < 5; a++) fill(arrays[a], at, begin, 0); /* contextual tokens are written later */
        for (npy_int64 i = first, to = begin; i < events; i++, to++) rows[to] = row_of(int_at(items, i), item_rows);
        for (npy_int64 i = first, to = begin; i < events; i++, to++) {
            npy_int64 action = int_at(masks, i) & mask;
            actions[to] = combinations ? (npy_int64)((npy_uint64)1 << action) : action;
        }
        for (npy_int64 i = first, to = begin; i < events; i++, to++) weights[to] = float_at(weighed, i);
        for (npy_int64 i = first, to = begin; i < events; i++, to++) positions[to] = i < last_position ? i : last_position;
        for (npy_int64 i = first, to = begin; i < events; i++, to++) {
            npy_uint64 before = i ? (npy_uint64)int_at(times, i - 1) : (npy_uint64)int_at(times, i);
            buckets[to] = time_bucket((npy_int64)((npy_uint64)int_at(times, i) - before), most);
        }
        npy_int64 newest = events ? int_at(times, events - 1) : now, left = 0;
        npy_uint64 gap = now > newest ? (npy_uint64)now - (npy_uint64)newest : 0;
        while (left < 64 && gap >= ((npy_uint64)2 << left) - 1) left++; /* bits of 1 + gap, less one */
        for (npy_int64 i = 0; i < targets; i++) rows[end + i] = row_of(int_at(chosen, i), item_rows);
        fill(actions, end, last, candidate_action);
        fill(arrays[2], end, last, 0);
        fill(positions, end, last, events < last_position ? events : last_position);
        fill(buckets, end, last, left < most ? left : most);
        for (npy_int64 i = 0; i < targets; i++) candidate_rows[placed + i] = end + i;
        npy_int64 starts[4] = {at, placed, keys, kept};
        for (int i = 0; i < (appends ? 4 : 2); i++) offsets[i][b] = starts[i];
        num_targets[b] = targets;
        placed += targets;
        at = last;
        keys += history + targets;
        kept += history;
        release(held, 4);
    }
    npy_int64 ends[4] = {at, placed, keys, kept};
    for (int i = 0; i < (appends ? 4 : 2); i++) fill(offsets[i], B, sequences + 1, ends[i]);
    fill(num_targets, B, sequences, 0);
    for (int a = 0; a < 5; a++) fill(arrays[a], at, tokens, 0);
    fill(candidate_rows, placed, wanted, 0);
    Py_RETURN_NONE;
failed:
    release(held, 4);
    return NULL;
}

static PyObject *write_places(PyObject *self, PyObject *args) {
    PyObject *buffer, *plans, *first_rows;
    Py_ssize_t rows, sequences, width, page;
    if (!PyArg_ParseTuple(args, "OO!O!nnnn", &buffer, &PyList_Type, &plans, &PyList_Type, &first_rows, &rows,
                          &sequences, &width, &page))
        return NULL;
    Py_ssize_t B = PyList_GET_SIZE(plans), packed = (sequences * width + 1) / 2;
    npy_int64 *cached = numbers(buffer, 2 * sequences + rows + packed);
    if (cached == NULL) return NULL;
    if (B > sequences || PyList_GET_SIZE(first_rows) < B || rows < 0 || width < 0 || page < 1)
        return PyErr_Format(PyExc_ValueError, "%zd plans don't fit %zd sequences", B, sequences);
    npy_int64 *stored = cached + sequences, *slots = stored + sequences;
    npy_int32 *table = (npy_int32 *)(slots + rows);
    fill(cached, B, sequences, 0);
    fill(stored, B, sequences, 0);
    fill(slots, 0, rows, -1);
    memset(table, 0, packed * sizeof(npy_int64));
    for (Py_ssize_t b = 0; b < B; b++) {
        PyObject *plan = PyList_GET_ITEM(plans, b), *pages = PyObject_GetAttr(plan, s_pages);
        Py_buffer view; /* holds the pages */
        int found = pages != NULL && PyObject_GetBuffer(pages, &view, PyBUF_SIMPLE) == 0;
        Py_XDECREF(pages);
        if (!found) return NULL;
        Py_ssize_t n = view.len / sizeof(npy_int32);
        npy_int64 row = entry(first_rows, b), first = 0;
        int fits = !PyErr_Occurred() && number(plan, s_cached, cached + b) && number(plan, s_stored, stored + b);
        if (fits && view.itemsize != sizeof(npy_int32)) {
            PyErr_Format(PyExc_TypeError, "the pages of plan %zd must be int32; they have %zd bytes", b, view.itemsize);
            fits = 0;
        }
        if (fits) {
            first = row - cached[b];
            fits = cached[b] >= 0 && stored[b] >= 0 && row >= 0 && n <= width && stored[b] <= n * page &&
                   (stored[b] <= cached[b] || row <= rows - (stored[b] - cached[b]));
        }
        if (fits) {
            const npy_int32 *ids = view.buf;
            memcpy(table + b * width, ids, n * sizeof(npy_int32));
            for (npy_int64 i = cached[b] / page; i * page < stored[b]; i++) {
                npy_int64 begin = i * page > cached[b] ? i * page : cached[b];
                npy_int64 end = (i + 1) * page < stored[b] ? (i + 1) * page : stored[b];
                for (npy_int64 t = begin; t < end; t++) slots[first + t] = (ids[i] - i) * page + t;
            }
        }
        PyBuffer_Release(&view);
        if (!fits)
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "plan %zd doesn't fit the places", b);
    }
    Py_RETURN_NONE;
}

static npy_intp first_difference(Column a, Column b, int is_float, npy_intp n) {
    npy_intp i = 0;
    if (is_float) {
        while (i < n && float_at(a, i) == float_at(b, i)) i++;
    } else {
        if (a.stride == 8 && b.stride == 8 && !memcmp(a.data, b.data, n * 8)) return n;
        while (i < n && int_at(a, i) == int_at(b, i)) i++;
    }
    return i;
}

static PyObject *common(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "common takes 2 histories");
    npy_intp n = NPY_MAX_INTP;
    int alike = 1;
    PyObject *held[8] = {NULL}, *result = NULL;
    for (int i = 0; i < 8; i++)
        if ((held[i] = PyObject_GetAttr(args[i / 4], columns_of_history[i % 4])) == NULL) goto done;
    for (int i = 0; i < 4; i++) {
        int is_float = i == 3, size = is_float ? 4 : 8;
        char kind = is_float ? 'f' : 'i';
        alike = is_column(held[i], kind, size) && is_column(held[4 + i], kind, size);
        if (!alike) break;
        Column a = as_column(held[i]), b = as_column(held[4 + i]);
        n = a.n < n ? a.n : n;
        n = b.n < n ? b.n : n;
        if (a.data != b.data || a.stride != b.stride) n = first_difference(a, b, is_float, n);
    }
    result = alike ? PyLong_FromSsize_t(n) : Py_NewRef(Py_None); /* NumPy compares other types */
done:
    release(held, 8);
    return result;
}

static PyMethodDef functions[] = {
    {"layout", layout, METH_VARARGS, NULL},
    {"write_tokens", write_tokens, METH_VARARGS, NULL},
    {"write_places", write_places, METH_VARARGS, NULL},
    {"common", (PyCFunction)(void (*)(void))common, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "grengines_native", NULL, -1, functions};

PyMODINIT_FUNC PyInit_grengines_native(void) {
    import_array();
    const char *names[] = {"history_items", "history_actions", "history_weights", "history_timestamps", "timestamp",
                           "pages",         "cached",          "stored",          "timestamps",         "items",
                           "actions",       "weights"};
    PyObject **places[] = {&s_items,  &s_actions, &s_weights, &s_timestamps, &s_timestamp, &s_pages, &s_cached,
                           &s_stored, columns_of_history, columns_of_history + 1, columns_of_history + 2,
                           columns_of_history + 3};
    for (int i = 0; i < 12; i++)
        if ((*places[i] = PyUnicode_InternFromString(names[i])) == NULL) return NULL;
    return PyModule_Create(&definition);
}
